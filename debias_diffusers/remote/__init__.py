"""Files on servers: read by ranges, or fetched into a bounded cache on the disk."""
