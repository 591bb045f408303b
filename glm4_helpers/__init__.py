"""Helpers of the course; nothing is imported until it is used."""
