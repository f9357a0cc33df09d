//! The one integration binary: layout of the rooms, SQL files, pipelines against real services.

mod layout;
mod slt;
