"""Conversations: trees of items that outlive turns, their list, and the search in them."""
