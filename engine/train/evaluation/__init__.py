"""What a model can do: losses, tool calls, arithmetic, answers, and whether the test was clean."""
