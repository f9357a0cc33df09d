//! What an online store had acknowledged when a manifest was written, by shard: the newest flush (generation, number).
//!
//! A store that does not remember it at a start was set back to an older copy while no process ran (restarted from its last
//! snapshot, a replica that was promoted): it has a fence and offsets, but lacks rows that the state holds for written.
//! Every key is written again then, as after a loss of the fence. Numbers of a store only rise, so those of shards that are
//! no more stay true; after a loss they begin anew, and the manifest that holds the marks forgets the old ones.

use std::collections::BTreeMap;

use serde_json::Value;

/// Under this name in the node's facts.
const NAME: &str = "flushed";

/// What a shard says at a barrier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShardFlush {
    pub shard: u32,
    /// The newest flush that this process knows to be written.
    pub acknowledged: Option<(u64, u64)>,
    /// The store lost its content, and every row is marked: earlier numbers mean nothing.
    pub anew: bool,
}

/// The facts of the next manifest.
pub fn kept(facts: Option<Value>, shards: impl Iterator<Item = ShardFlush> + Clone) -> Option<Value> {
    if shards.clone().next().is_none() {
        return facts;
    }
    let anew = shards.clone().any(|shard| shard.anew);
    let mut flushed = if anew { BTreeMap::new() } else { read(facts.as_ref()) };
    flushed.extend(
        shards.filter(|shard| !shard.anew).filter_map(|shard| Some((shard.shard, shard.acknowledged?))),
    );
    if flushed.is_empty() {
        return None;
    }
    let shards = flushed.into_iter().map(|(shard, at)| (shard.to_string(), Value::from(vec![at.0, at.1])));
    Some(Value::Object([(NAME.to_owned(), Value::Object(shards.collect()))].into_iter().collect()))
}

/// Whether a store that remembers `found` has forgotten what it had acknowledged.
pub fn set_back(facts: Option<&Value>, found: &BTreeMap<u32, (u64, u64)>) -> bool {
    read(facts).iter().any(|(shard, at)| found.get(shard).is_none_or(|found| found < at))
}

/// What is no such fact is none: the store is then taken at its word.
fn read(facts: Option<&Value>) -> BTreeMap<u32, (u64, u64)> {
    let Some(shards) = facts.and_then(|facts| facts.get(NAME)?.as_object()) else { return BTreeMap::new() };
    let number = |value: &Value, at: usize| value.get(at)?.as_u64();
    let shard = |(shard, value): (&String, &Value)| {
        Some((shard.parse().ok()?, (number(value, 0)?, number(value, 1)?)))
    };
    shards.iter().filter_map(shard).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shard(shard: u32, acknowledged: Option<(u64, u64)>, anew: bool) -> ShardFlush {
        ShardFlush { shard, acknowledged, anew }
    }

    #[test]
    fn a_store_that_forgot_a_flush_was_set_back() {
        let store = |entries: &[(u32, (u64, u64))]| entries.iter().copied().collect::<BTreeMap<_, _>>();
        let facts = kept(None, [shard(0, Some((3, 9)), false), shard(1, None, false)].into_iter());
        assert_eq!(facts.as_ref().unwrap().to_string(), r#"{"flushed":{"0":[3,9]}}"#);
        assert!(!set_back(facts.as_ref(), &store(&[(0, (3, 9))])));
        assert!(!set_back(facts.as_ref(), &store(&[(0, (4, 1)), (1, (4, 1))])), "it went on");
        assert!(set_back(facts.as_ref(), &store(&[(0, (3, 8))])));
        assert!(set_back(facts.as_ref(), &store(&[(0, (2, 900))])));
        assert!(set_back(facts.as_ref(), &store(&[(1, (3, 9))])));
        // A next process with one shard, which has written nothing yet: what it found there still holds.
        let next = kept(facts.clone(), [shard(0, None, false)].into_iter());
        assert_eq!(next, facts);
        // Numbers begin anew with the marks of a loss.
        let next = kept(facts, [shard(0, Some((3, 9)), true), shard(1, None, true)].into_iter());
        assert_eq!(next, None);
        assert!(!set_back(None, &store(&[])));
    }

    #[test]
    fn facts_of_others_are_left_alone() {
        let other = serde_json::json!({"flushed": {"x": [1, 2], "0": "no", "1": [1]}, "more": 1});
        assert_eq!(kept(Some(other.clone()), std::iter::empty()), Some(other.clone()));
        assert!(!set_back(Some(&other), &BTreeMap::new()));
    }
}
