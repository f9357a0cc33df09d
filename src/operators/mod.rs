//! Operators: pure and synchronous, changes in, changes out. They never read a clock and never do I/O.

pub mod newest;
