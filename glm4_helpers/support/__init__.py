"""What every other room needs: errors, paths, files. It imports no other room."""
