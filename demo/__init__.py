"""Builds the embedded demo: synthesized clips and a tiny Mandarin and English Whisper."""
