"""Language models as records of pure functions over nested dicts of parameters.

Read ``model`` first (the interface), then ``decoder`` (the decoder-only implementation) and ``t5`` (the
encoder-decoder). Both are built from ``layers``, ``rope`` and ``kv_cache``.
"""
