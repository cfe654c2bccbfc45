"""Encoders: what turns pictures and prompts into features. None of them knows nerfstudio."""
