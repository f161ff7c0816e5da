"""What parts of the work cost, each measured side by side with what it is compared with; one file a benchmark."""
