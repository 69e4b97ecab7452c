"""What a stage needs on accelerators that this machine does not have."""
