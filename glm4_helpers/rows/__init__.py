"""Reads files, gives columns their meaning and reports what was found. Door: `data`."""
