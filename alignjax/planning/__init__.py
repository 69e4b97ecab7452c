"""What a stage will need on machines that are not here."""
