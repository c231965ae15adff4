"""What a run will need, before machines are rented. Delete it and training runs with `--forecast False`."""
