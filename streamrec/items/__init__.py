"""The table of items, the items that no list may contain, and the sweep of published lists."""
