//! The slow, readable definition of every operation.
