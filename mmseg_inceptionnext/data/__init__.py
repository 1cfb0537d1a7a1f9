"""The training side of files: data sets checked, read and guarded, and a generated one."""
