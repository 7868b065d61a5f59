"""hf_turbo.patches: what is known of the host stack. One host concept is one file; engine.py holds the mechanism."""
