//! Looking ahead in memory.
//!
//! The keys of a batch lie all over the memory, and a loop that does much for each of them waits for each in turn. A loop
//! before it that only looks at them waits for many at once: a processor goes on to the next ones while the first are on
//! their way. So a loop over slots goes block by block, looks, and then works on what is near.

/// Slots that are looked at before they are worked on: what they need together fits the nearest cache.
pub(super) const BLOCK: usize = 64;

/// Reads of each slot what `glance` does; what that gives means nothing.
#[inline]
pub(super) fn look(slots: &[u32], glance: impl Fn(usize) -> usize) {
    let seen = slots.iter().fold(0, |seen, slot| seen ^ glance(*slot as usize));
    std::hint::black_box(seen);
}
