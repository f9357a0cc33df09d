//! Accounts: what became of every row, and whether nothing was lost on the way.
//!
//! Every node of a pipeline counts the rows that it took in and what became of them, in totals since its state was
//! born; a shard's counts of an epoch travel with its barrier and are added up in the epoch's manifest. So a crash
//! neither loses nor doubles a count: what was counted after the last manifest is counted again by the replay.
//!
//! What must hold of a manifest ([`faults`]):
//! - a source: read = accepted + tombstones + skipped + dead letters;
//! - between two nodes: what one took in is what the other let out, also through an exchange;
//! - a stateless node: in + added = out + filtered + dead letters;
//! - OVER: in = settled (their results are final) + held (they wait for the watermark) + late;
//! - a sink that keeps every row: in = written, where a table's rows are those of its files, + what a backup knew before
//!   (rows of a bootstrap) + dead letters;
//! - dead letters: those counted are in segments.
//!
//! A count begins anew when its node is new, when the program that wrote the state before did not count, or when what
//! the node reads has another name or began anew itself: [`Input::before`] is what had left there by then.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::manifest::Manifest;

/// What a node is, as far as its account goes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Rows go through: filter, projection, look-up, UNNEST, UNION.
    #[default]
    Stateless,
    Over,
    Group,
    /// Keeps every row.
    Sink,
    /// Keeps the newest row per key.
    KeyedSink,
}

/// Totals of an operator or sink since its count began.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeAccounts {
    pub role: Role,
    pub inputs: Vec<Input>,
    pub rows_in: u64,
    /// Rows that were let out, by port; changes and newest rows are counted as often as they were said.
    pub rows_out: BTreeMap<String, u64>,
    /// Left out by WHERE, HAVING, a join or an empty list; by a backup, as it has them already.
    pub filtered: u64,
    /// More than came, by a join or a list.
    pub added: u64,
    /// Below the watermark all the same: always 0, lateness is decided in the source.
    pub late: u64,
    pub dead_letters: u64,
    /// Rows of OVER that can no longer change.
    pub settled: u64,
    /// Rows of OVER that wait for the watermark now.
    pub held: u64,
    /// Those that waited when the count began.
    pub held_before: u64,
    /// Rows of a sink's files or commits; keys that an online store acknowledged.
    pub written: u64,
    /// Keys that wait for an online store now.
    pub waiting: u64,
}

/// Where rows come from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Input {
    pub node: String,
    pub port: String,
    /// Rows that had left there when the reader's count began.
    pub before: u64,
}

/// Accounts that do not add up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The source, operator or sink.
    pub at: String,
    pub what: String,
}

/// Ports of a source, whose rows are counted by its own accounts.
pub const ACCEPTED: &str = "accepted";
pub const ON_TIME: &str = "on time";

/// Rows that have left a node by a port; `None` when nobody counts them.
pub fn rows_out(manifest: &Manifest, node: &str, port: &str) -> Option<u64> {
    if let Some(name) = node.strip_suffix(".source") {
        let accounts = manifest.sources.get(name)?.accounts;
        return match port {
            ACCEPTED => Some(accounts.accepted),
            ON_TIME => accounts.accepted.checked_sub(accounts.late),
            _ => None,
        };
    }
    let accounts = manifest.nodes.get(node)?.accounts.as_ref()?;
    Some(accounts.rows_out.get(port).copied().unwrap_or(0))
}

/// What does not add up; empty when all is well.
pub fn faults(manifest: &Manifest) -> Vec<Fault> {
    let mut faults = Vec::new();
    let mut check = |at: &str, holds: bool, what: &dyn Fn() -> String| {
        if !holds {
            faults.push(Fault { at: at.to_owned(), what: what() });
        }
    };
    let mut dead = 0;
    for (name, source) in &manifest.sources {
        let a = source.accounts;
        dead += a.dead_letters;
        check(name, a.balanced(), &|| {
            format!(
                "read {} is not accepted {} + tombstones {} + skipped {} + dead letters {}",
                a.read, a.accepted, a.tombstones, a.skipped, a.dead_letters
            )
        });
        check(name, a.late <= a.accepted, &|| {
            format!("late {} is more than accepted {}", a.late, a.accepted)
        });
    }
    for (id, node) in &manifest.nodes {
        let Some(a) = &node.accounts else { continue };
        dead += a.dead_letters;
        let came: Option<u64> = a.inputs.iter().map(|from| came(manifest, from)).sum();
        check(id, came == Some(a.rows_in), &|| {
            let from: Vec<String> =
                a.inputs.iter().map(|from| format!("{} ({})", from.node, from.port)).collect();
            let came = came.map_or_else(|| "an unknown number".to_owned(), |came| came.to_string());
            format!("rows in {} is not what left {}: {came}", a.rows_in, from.join(" and "))
        });
        check(id, a.balanced(), &|| a.unbalanced());
    }
    let kept: u64 = manifest.dead_letters.iter().map(|segment| segment.rows).sum();
    check("dead letters", kept >= dead, &|| format!("{kept} are kept, {dead} were counted"));
    faults
}

fn came(manifest: &Manifest, from: &Input) -> Option<u64> {
    rows_out(manifest, &from.node, &from.port)?.checked_sub(from.before)
}

impl NodeAccounts {
    fn out(&self) -> u64 {
        self.rows_out.values().sum()
    }

    /// Whether every row that came in is accounted for.
    fn balanced(&self) -> bool {
        match self.role {
            Role::Stateless => self.rows_in + self.added == self.out() + self.filtered + self.dead_letters,
            Role::Over => self.rows_in + self.held_before == self.settled + self.held + self.late,
            Role::Group => true,
            Role::Sink => self.rows_in == self.written + self.filtered + self.dead_letters,
            Role::KeyedSink => self.dead_letters <= self.rows_in,
        }
    }

    fn unbalanced(&self) -> String {
        let Self {
            rows_in, added, filtered, dead_letters, held_before, settled, held, late, written, ..
        } = self;
        match self.role {
            Role::Stateless | Role::Group => format!(
                "rows in {rows_in} + added {added} is not out {} + filtered {filtered} + dead letters {dead_letters}",
                self.out()
            ),
            Role::Over => format!(
                "rows in {rows_in} + held before {held_before} is not settled {settled} + held {held} + late {late}"
            ),
            Role::Sink => format!(
                "rows in {rows_in} is not written {written} + known before {filtered} + dead letters {dead_letters}"
            ),
            Role::KeyedSink => format!("dead letters {dead_letters} are more than rows in {rows_in}"),
        }
    }
}

/// What became of the rows that came to a view, before its first OVER or GROUP BY: in + added = applied + filtered +
/// dead letters. A row counts once per branch of a UNION.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ViewAccounts {
    pub view: String,
    pub rows_in: u64,
    pub added: u64,
    /// Taken in by an OVER or a GROUP BY, or handed to sinks and other views.
    pub applied: u64,
    pub filtered: u64,
    /// Rows of the source that never come to a view which closes by time.
    pub late: u64,
    pub dead_letters: u64,
}

/// The view of an operator; none for a source or a sink.
pub fn view_of(id: &str) -> Option<&str> {
    id.rsplit_once('.').map(|(view, _)| view)
}

/// By view, the accounts of its first nodes: those through which rows go as they are.
pub fn views(manifest: &Manifest) -> Vec<ViewAccounts> {
    let counted =
        || manifest.nodes.iter().filter_map(|(id, node)| Some((id.as_str(), node.accounts.as_ref()?)));
    let of = |view: &str, id: &str| view_of(id) == Some(view) && !id.ends_with(".source");
    // Sinks and backups have projections of their own.
    let helper = |name: &&str| manifest.sources.contains_key(*name) || manifest.nodes.contains_key(*name);
    let names: BTreeSet<&str> =
        counted().filter_map(|(id, _)| view_of(id)).filter(|name| !helper(name)).collect();
    let late: u64 = manifest.sources.values().map(|source| source.accounts.late).sum();
    let mut views = Vec::new();
    for view in names {
        // Ids are in no order of the plan, so look until no more are found.
        let mut first: BTreeSet<&str> = BTreeSet::new();
        let enters = |first: &BTreeSet<&str>, input: &Input| {
            !of(view, &input.node) || first.contains(input.node.as_str())
        };
        loop {
            let more: Vec<&str> = counted()
                .filter(|(id, a)| of(view, id) && a.role == Role::Stateless && !first.contains(id))
                .filter(|(_, a)| a.inputs.iter().all(|input| enters(&first, input)))
                .map(|(id, _)| id)
                .collect();
            if more.is_empty() {
                break;
            }
            first.extend(more);
        }
        let mut sum = ViewAccounts { view: view.to_owned(), ..ViewAccounts::default() };
        let mut left = BTreeSet::new();
        for (id, accounts) in counted() {
            let inside = first.contains(id);
            for input in &accounts.inputs {
                let from_first = first.contains(input.node.as_str());
                let enters = of(view, id) && !of(view, &input.node);
                let rows = came(manifest, input).unwrap_or(0);
                sum.rows_in += if enters { rows } else { 0 };
                let direct = enters && !inside;
                if direct || from_first && !inside && left.insert((input.node.as_str(), input.port.as_str()))
                {
                    sum.applied += rows;
                }
                if enters && input.port == ON_TIME {
                    sum.late = late;
                }
            }
            if inside {
                sum.added += accounts.added;
                sum.filtered += accounts.filtered;
                sum.dead_letters += accounts.dead_letters;
            }
        }
        views.push(sum);
    }
    views
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::state::manifest::{Accounts, Claimant, Segment, next_claim};

    fn node(role: Role, from: (&str, &str, u64), rows_in: u64) -> NodeAccounts {
        let input = Input { node: from.0.into(), port: from.1.into(), before: from.2 };
        NodeAccounts { role, inputs: vec![input], rows_in, ..NodeAccounts::default() }
    }

    /// 10 records: 1 is bad, 2 are late; WHERE leaves out 3 of 7, OVER holds 1 of 4, an expression fails on 1 of 3.
    fn sound() -> Manifest {
        let claimant = Claimant { pipeline: "p", writer: Uuid::from_u128(1), now_ms: 0 };
        let mut manifest = next_claim(None, 1, Uuid::from_u128(2), &claimant);
        manifest.sources.entry("s".into()).or_default().accounts =
            Accounts { read: 10, accepted: 9, dead_letters: 1, late: 2, ..Accounts::default() };
        let out = |port: &str, rows| [(port.to_owned(), rows)].into();
        let nodes = [
            (
                "v.filter1",
                NodeAccounts {
                    filtered: 3,
                    rows_out: out(ON_TIME, 4),
                    ..node(Role::Stateless, ("s.source", ON_TIME, 0), 7)
                },
            ),
            (
                "v.over2",
                NodeAccounts {
                    settled: 3,
                    held: 1,
                    rows_out: out("final", 3),
                    ..node(Role::Over, ("v.filter1", ON_TIME, 0), 4)
                },
            ),
            (
                "v.project3",
                NodeAccounts {
                    dead_letters: 1,
                    rows_out: out("final", 2),
                    ..node(Role::Stateless, ("v.over2", "final", 0), 3)
                },
            ),
            ("table", NodeAccounts { written: 2, ..node(Role::Sink, ("v.project3", "final", 0), 2) }),
            ("backup", NodeAccounts { written: 5, ..node(Role::Sink, ("s.source", ACCEPTED, 4), 5) }),
        ];
        for (id, accounts) in nodes {
            manifest.nodes.entry(id.into()).or_default().accounts = Some(accounts);
        }
        let segment = |rows| Segment { path: "dead-letters/s/d".into(), epoch: 1, rows, source: "s".into() };
        manifest.dead_letters = vec![segment(1), segment(1)];
        manifest
    }

    #[test]
    fn sound_accounts_have_no_fault() {
        assert_eq!(faults(&sound()), []);
    }

    #[test]
    fn a_view_applies_what_it_does_not_filter() {
        let v = ViewAccounts {
            view: "v".into(),
            rows_in: 7,
            applied: 4,
            filtered: 3,
            late: 2,
            ..ViewAccounts::default()
        };
        assert_eq!(views(&sound()), [v]);
    }

    #[test]
    fn every_number_that_is_off_by_one_is_a_fault_of_its_owner() {
        type Change = fn(&mut NodeAccounts);
        let changes: [(&str, Change, &str); 10] = [
            ("v.filter1", |a| a.rows_in += 1, "v.filter1"),
            ("v.filter1", |a| a.filtered += 1, "v.filter1"),
            ("v.filter1", |a| *a.rows_out.get_mut(ON_TIME).unwrap() += 1, "v.over2"),
            ("v.over2", |a| a.held = 0, "v.over2"),
            ("v.over2", |a| a.late += 1, "v.over2"),
            ("v.over2", |a| a.rows_in -= 1, "v.over2"),
            ("v.project3", |a| a.dead_letters = 0, "v.project3"),
            ("table", |a| a.written -= 1, "table"),
            ("backup", |a| a.inputs[0].before = 0, "backup"),
            ("v.project3", |a| a.dead_letters += 1, "dead letters"),
        ];
        for (id, change, owner) in changes {
            let mut manifest = sound();
            change(manifest.nodes.get_mut(id).unwrap().accounts.as_mut().unwrap());
            let found = faults(&manifest);
            assert!(found.iter().any(|fault| fault.at == owner), "{id}: {found:?}");
        }
        let mut manifest = sound();
        manifest.sources.get_mut("s").unwrap().accounts.read += 1;
        assert_eq!(
            faults(&manifest)[0].what,
            "read 11 is not accepted 9 + tombstones 0 + skipped 0 + dead letters 1"
        );
        let mut manifest = sound();
        manifest.nodes.remove("v.over2");
        assert_eq!(faults(&manifest)[0].at, "v.project3");
        assert!(faults(&manifest)[0].what.contains("an unknown number"));
    }
}
