"""The operating-system process: signals, temporary folders, kill points for tests."""
