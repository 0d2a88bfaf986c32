"""Which chunks a store policy keeps: traces through the real scheduler side and its indexes."""
