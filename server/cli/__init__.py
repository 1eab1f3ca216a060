"""What the command ``millrace`` does; ``server.__main__`` only says which options there are."""
