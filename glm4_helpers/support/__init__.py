"""Errors, paths and files, which every other room needs. It imports no other room."""
