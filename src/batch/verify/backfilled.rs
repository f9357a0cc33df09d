//! Intervals that were backfilled: another answer applies to their rows, the batch's own.
//!
//! The ledger in the sink's table names each interval and the version of the backup that it was computed from; where
//! intervals overlap the later one counts. Such an interval
//!
//! - **of a view that closes by time** has the sink's SQL over all rows of that version, late and replayed ones included;
//!   the stream adds nothing to it;
//! - **of a view without windows** has what the stream has, which goes on appending to it, and the records that had been
//!   replayed into that version.
//!
//! If the backup got no row since that an interval sees, its pinned version stands for the older one. If it did, and the
//! older version is gone (vacuumed, or its log cleaned up), or if the interval was computed by other SQL, its rows are not
//! compared, and that is said.

use std::collections::BTreeMap;

use arrow::array::RecordBatch;
use datafusion::logical_expr::{Expr, lit};
use datafusion::prelude::ident;
use datafusion::scalar::ScalarValue;

use super::answer::LeftOut;
use super::pins::Committed;
use super::{Report, Verifier, bound, quote, shown};
use crate::batch::history::{Backup, Cut, backup_of};
use crate::connectors::delta::ledger::{Finished, added, fingerprint, ledger, readable};
use crate::connectors::delta::replace::Interval;
use crate::connectors::delta::table::{AsOf, provider_as_of};
use crate::error::Result;
use crate::plan::session::batch_session_within;
use crate::stream::Micros;
use crate::stream::letters::schema as letters_schema;

/// What was backfilled of what is compared.
#[derive(Default)]
pub struct Backfilled {
    /// Compared with the batch answer over a version of the backup. They do not overlap.
    pub known: Vec<(Interval, u64)>,
    /// Not compared.
    pub unknown: Vec<Interval>,
}

impl Verifier<'_> {
    /// The intervals of a table of `location` that other answers than the stream's apply to.
    pub async fn backfilled(
        &self,
        (location, version): (&str, u64),
        backup: &Committed,
        owner: &str,
        report: &mut Report,
    ) -> Result<Backfilled> {
        let app = format!("{}/{}", self.request.name, self.sink.name);
        let known = ledger(location, &app, version).await?;
        let mut parts = in_force(&known);
        let (from, to) = (self.request.from.unwrap_or(Micros::MIN), self.request.to.unwrap_or(Micros::MAX));
        parts.retain(|(part, _)| part.overlaps(&Interval { from, to }));
        let mut found = Backfilled::default();
        let Backup::Delta(source) = backup_of(self.request.catalog, self.request.plan, self.source)? else {
            return Ok(found);
        };
        if parts.is_empty() {
            return Ok(found);
        }
        report.backfilled = parts.len();
        let ours = fingerprint(&self.request.plan.fingerprint(self.id), Some(owner));
        let time = self.source.event_time.map(|time| self.source.schema.field(time).name().as_str());
        let oldest = parts.iter().filter_map(|(_, known)| known.backup_version).min();
        let grown = match (oldest, time) {
            (Some(oldest), Some(time)) if oldest <= backup.version => {
                added(&source, oldest, backup.version, time).await?
            }
            _ => None,
        };
        let mut readable_versions = BTreeMap::new();
        for (part, known) in parts {
            let Some(computed_from) = known.backup_version.filter(|_| known.fingerprint == ours) else {
                let why = "it was backfilled by other SQL, or for another state";
                unknown(&mut found, part, why, report);
                continue;
            };
            let seen = self.sees(part);
            let same = grown.as_ref().is_some_and(|grown| {
                !grown.iter().any(|added| added.version > computed_from && seen.touches(added.range))
            });
            if same {
                known_as(&mut found, part, backup.version);
                continue;
            }
            let is_readable = match readable_versions.get(&computed_from) {
                Some(known) => *known,
                None => readable(&source, computed_from).await?,
            };
            readable_versions.insert(computed_from, is_readable);
            match is_readable {
                true => known_as(&mut found, part, computed_from),
                false => {
                    let why =
                        format!("version {computed_from} of the backup, which it was computed from, is gone");
                    unknown(&mut found, part, &why, report);
                }
            }
        }
        Ok(found)
    }

    /// Event times of the source's rows that an interval sees.
    pub fn sees(&self, part: Interval) -> Interval {
        let Some(reach) = self.request.plan.reach(self.id) else {
            return Interval { from: Micros::MIN, to: Micros::MAX };
        };
        let from = reach.ahead.map_or(Micros::MIN, |ahead| part.from.saturating_sub(ahead));
        Interval { from, to: part.to.saturating_add(reach.back) }
    }

    /// Which rows of the backup an interval was computed from. `stream`: those of the stream.
    pub async fn cut_of(&self, version: u64, stream: &Cut, left_out: &LeftOut) -> Result<Cut> {
        if self.closes() {
            return Ok(Cut { version: Some(version), below: None, without: None });
        }
        let source = backup_of(self.request.catalog, self.request.plan, self.source)?;
        let Backup::Delta(location) = source else { return Ok(stream.clone()) };
        let later = self.replayed_later(&location, version, left_out).await?;
        Ok(Cut { without: Some(left_out.with_replayed(&later)?), ..stream.clone() })
    }

    /// The replayed records that a version of the backup has not yet.
    async fn replayed_later(
        &self,
        location: &str,
        version: u64,
        left_out: &LeftOut,
    ) -> Result<Vec<RecordBatch>> {
        let session = batch_session_within(self.request.memory)?;
        session.register_table("__backup", provider_as_of(location, AsOf::Version(version)).await?)?;
        session.register_batch("__replayed", left_out.replayed().clone())?;
        let schema = letters_schema().project(&[4, 5, 6])?;
        let names: Vec<String> = schema.fields().iter().map(|field| quote(field.name())).collect();
        let sql = format!(
            "SELECT {} FROM __replayed AS r WHERE NOT EXISTS (SELECT 1 FROM __backup AS b
             WHERE b._topic = r.topic AND b._partition = r.\"partition\" AND b._offset = r.\"offset\")",
            names.join(", ")
        );
        Ok(session.sql(&sql).await?.collect().await?)
    }

    /// Whether a row of the sink lies in one of some intervals.
    pub fn inside(&self, parts: impl IntoIterator<Item = Interval>) -> Option<Expr> {
        let time = self.sink.schema.field(self.sink.time?).name();
        parts.into_iter().map(|part| within(time, part)).reduce(Expr::or)
    }

    /// The same as a further condition in SQL: a row lies in none of them.
    pub fn outside(&self, parts: &[Interval]) -> String {
        let Some(time) = self.sink.time else { return String::new() };
        let time = self.sink.schema.field(time).name();
        let one = |part: &Interval| {
            format!(" AND ({} AND {}) IS NOT TRUE", bound(time, ">=", part.from), bound(time, "<", part.to))
        };
        parts.iter().map(one).collect()
    }
}

/// Whether a column lies in an interval.
pub fn within(time: &str, part: Interval) -> Expr {
    let at = |time| lit(ScalarValue::TimestampMicrosecond(Some(time), Some("UTC".into())));
    ident(time).gt_eq(at(part.from)).and(ident(time).lt(at(part.to)))
}

fn known_as(found: &mut Backfilled, part: Interval, version: u64) {
    match found.known.last_mut() {
        Some((last, of)) if last.to == part.from && *of == version => last.to = part.to,
        _ => found.known.push((part, version)),
    }
}

fn unknown(found: &mut Backfilled, part: Interval, why: &str, report: &mut Report) {
    report.cannot_prove(format!("rows from {} to {}: {why}", shown(part.from), shown(part.to)));
    found.unknown.push(part);
}

/// The stretches of time that were backfilled, in order, each with the entry that came last.
fn in_force(ledger: &[Finished]) -> Vec<(Interval, &Finished)> {
    let mut edges: BTreeMap<Micros, (Vec<&Finished>, Vec<i64>)> = BTreeMap::new();
    for known in ledger.iter().filter(|known| known.interval.from < known.interval.to) {
        edges.entry(known.interval.from).or_default().0.push(known);
        edges.entry(known.interval.to).or_default().1.push(known.turn);
    }
    let mut open: BTreeMap<i64, &Finished> = BTreeMap::new();
    let mut parts: Vec<(Interval, &Finished)> = Vec::new();
    let mut from = Micros::MIN;
    for (at, (begin, end)) in edges {
        if let Some((turn, known)) = open.last_key_value() {
            match parts.last_mut() {
                Some((part, last)) if part.to == from && last.turn == *turn => part.to = at,
                _ => parts.push((Interval { from, to: at }, known)),
            }
        }
        for turn in end {
            open.remove(&turn);
        }
        open.extend(begin.into_iter().map(|known| (known.turn, known)));
        from = at;
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_backfill_counts() {
        let known = |from, to, turn| Finished {
            interval: Interval { from, to },
            turn,
            fingerprint: 1,
            rows: None,
            backup_version: Some(0),
            finished_at: None,
        };
        let parts = |ledger: &[Finished]| -> Vec<(i64, i64, i64)> {
            in_force(ledger).into_iter().map(|(part, known)| (part.from, part.to, known.turn)).collect()
        };
        assert_eq!(parts(&[]), []);
        assert_eq!(parts(&[known(10, 20, 1), known(30, 40, 2)]), [(10, 20, 1), (30, 40, 2)]);
        assert_eq!(
            parts(&[known(10, 20, 1), known(20, 30, 2)]),
            [(10, 20, 1), (20, 30, 2)],
            "they touch, and are of two versions"
        );
        let across = [known(10, 40, 1), known(20, 30, 2)];
        assert_eq!(parts(&across), [(10, 20, 1), (20, 30, 2), (30, 40, 1)]);
        let over = [known(10, 40, 5), known(20, 30, 2), known(35, 50, 3)];
        assert_eq!(parts(&over), [(10, 40, 5), (40, 50, 3)]);
    }
}
