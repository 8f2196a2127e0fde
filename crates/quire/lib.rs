//! Quire, the application shell.
