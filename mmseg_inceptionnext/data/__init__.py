"""Check, read and guard data sets, and generate a small one."""
