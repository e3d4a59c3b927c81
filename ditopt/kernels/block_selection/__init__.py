"""Which key blocks each query block attends to, chosen from the data of a call."""
