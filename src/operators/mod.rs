//! Pure and synchronous: changes in, changes out. No clock, no I/O, no tasks. One file or folder per operator.

mod ahead;
pub mod group;
pub mod lookup;
pub mod newest;
pub mod over;
mod slots;
pub mod stateless;
