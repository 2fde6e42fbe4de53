"""What any part may use: seeding, atomic files, memory, a background thread, the console, processes and their errors."""
