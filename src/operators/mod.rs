//! Pure and synchronous: changes in, changes out. No clock, no I/O, no tasks. One file or folder per operator.

pub mod newest;
pub mod stateless;
