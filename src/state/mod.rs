//! State that outlives the process: key groups, state files, manifests and their store.
//!
//! A key's hash ([`keys`]) decides its key group, and the key group decides its shard and its place in a state file
//! ([`files`]). A [`manifest`] names every live file together with the offsets that they were built from; manifests
//! form one chain, and owning the newest one is owning the pipeline. [`store`] is the only part that does I/O.
//!
//! Three formats here are persistent: the key hash (frozen by golden values), the state file and the manifest (each
//! with a format version that is checked before anything else is believed).

pub mod accounts;
pub mod compaction;
pub mod files;
pub mod journal;
pub mod keys;
pub mod manifest;
pub mod store;

mod key_index;
