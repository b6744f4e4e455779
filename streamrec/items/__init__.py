"""What a shop knows of its items: the table, the items that no list may contain, and the sweep of published lists."""
