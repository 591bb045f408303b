"""What rows look like: readers of files, shapes of columns, reports of what was found. Door: `data`."""
