//! A sink against the answer that applies to it (DESIGN §3 *Late*): the view's SQL over the backup.
//!
//! - **Which rows of the backup count**: those below the offsets that the sink has committed, without rows that a replay
//!   appended (the stream never saw them), without rows that are dead letters of the sink or of a view below it, and for
//!   views that close by time without late rows. Rows of views with state are compared up to `complete_until`.
//! - **Intervals that were backfilled** have the batch answer, late rows included ([`backfilled`]).
//! - **A backup** has nothing to be compared with but the accounts of its source: origins that stand twice, origins beyond
//!   the committed offsets, and rows fewer than were accepted are differences.
//! - **An online store** is compared with the newest row of each key over all rows that the backup has. Expired keys may be
//!   gone, and while the pipeline runs a row may be newer than the backup.
//!
//! Tables are pinned before the state is read: the manifest that prepared a commit is older than the commit. Nothing is
//! claimed or written. Both sides meet in one aggregation, which spills; only rows that differ are held.

mod answer;
mod backfilled;
mod backup;
pub mod compare;
mod online;
mod pins;

use std::sync::Arc;

use datafusion::logical_expr::Expr;
use datafusion::prelude::ident;
use serde::Serialize;

use super::history::Cut;
use crate::connectors::delta::config::Mode;
use crate::connectors::delta::replace::Interval;
use crate::connectors::delta::table::{AsOf, provider_as_of};
use crate::error::{Error, Result};
use crate::plan::session::batch_session_within;
use crate::plan::{NodeId, NodeKind, SinkKind, SinkPlan, SourcePlan, StreamPlan};
use crate::sql::{Catalog, SinkInput};
use crate::stream::{END_OF_TIME, Micros};
use backfilled::Backfilled;
pub use backup::BackupReport;
use compare::{Compared, Plan, Side, compare, quote};

/// Parts of the keys that a sample can tell apart.
const SAMPLE_PARTS: u32 = 65_536;

pub struct Request<'a> {
    pub catalog: &'a Catalog,
    /// With its secrets.
    pub plan: &'a StreamPlan,
    /// Of the pipeline.
    pub name: &'a str,
    pub state: &'a str,
    pub sink: &'a str,
    pub from: Option<Micros>,
    pub to: Option<Micros>,
    /// Share of the rows, 0 to 1.
    pub sample: Option<f64>,
    /// Differing rows of each kind that are shown.
    pub shown: usize,
    /// Bytes beyond which sorts and aggregations spill.
    pub memory: Option<u64>,
}

#[derive(Debug, Default, Serialize)]
pub struct Report {
    pub sink: String,
    pub connector: &'static str,
    pub same: bool,
    /// µs: rows below were compared; `None`: all rows.
    pub until: Option<Micros>,
    /// Origins that are in the backup and not in the answer.
    pub late: usize,
    pub dead_letters: usize,
    pub replayed: usize,
    /// Intervals that were backfilled: their rows are compared with the batch answer, late rows included.
    pub backfilled: usize,
    pub compared: Option<Compared>,
    pub backup: Option<BackupReport>,
    /// Rows that would differ if late rows counted.
    pub late_would_change: Option<i64>,
    pub unproven: Vec<String>,
}

impl Report {
    fn cannot_prove(&mut self, what: impl Into<String>) {
        let what = what.into();
        if !self.unproven.contains(&what) {
            self.unproven.push(what);
        }
    }
}

/// # Errors
/// User: no such sink, or one that cannot be compared; the SQL. External: a store failed.
pub async fn verify(request: &Request<'_>) -> Result<Report> {
    let found = request.plan.sinks().find(|(_, sink)| sink.name == request.sink);
    let (id, sink) = found.ok_or_else(|| {
        let names: Vec<&str> = request.plan.sinks().map(|(_, sink)| sink.name.as_str()).collect();
        Error::user(format!("there is no sink {}", request.sink))
            .hint(format!("The sinks are {}.", names.join(", ")))
    })?;
    if request.plan.reads_letters(id) {
        return Err(Error::user(format!("{} holds dead letters, which no backup has", sink.name))
            .hint("Look at them with `millstream dead-letters ls`."));
    }
    let (_, source) = request.plan.source().ok_or_else(|| Error::user("the pipeline reads no source"))?;
    let verifier = Verifier { request, id, sink, source };
    let mut report =
        Report { sink: sink.name.clone(), connector: sink.kind.connector(), ..Report::default() };
    match &sink.kind {
        SinkKind::Delta(config) if verifier.is_backup() => {
            verifier.backup(&config.location, &mut report).await?;
        }
        SinkKind::Delta(config) => verifier.delta(&config.location, &config.mode, &mut report).await?,
        SinkKind::Online { store, ttl_micros } => verifier.online(store, *ttl_micros, &mut report).await?,
        SinkKind::Ndjson(_) => {
            let message = format!("the files of {} do not say which records they cover", sink.name);
            return Err(Error::user(message).hint("Verify a Delta sink of the same view."));
        }
        _ => {
            return Err(Error::user(format!("the sink {} keeps no rows that can be compared", sink.name))
                .hint("Verify a Delta or Redis sink."));
        }
    }
    let compared = report.compared.as_ref().map_or(0, Compared::differences);
    let backup = report.backup.as_ref().map_or(0, BackupReport::differences);
    report.same = compared + backup == 0 && !report.compared.as_ref().is_some_and(|c| c.truncated);
    Ok(report)
}

struct Verifier<'a> {
    request: &'a Request<'a>,
    id: NodeId,
    sink: &'a SinkPlan,
    source: &'a SourcePlan,
}

/// Nodes from a sink up to the source.
fn chain(plan: &StreamPlan, id: NodeId) -> Vec<NodeId> {
    let above = plan.nodes[id].inputs.iter().flat_map(|edge| chain(plan, edge.from));
    std::iter::once(id).chain(above).collect()
}

impl Verifier<'_> {
    fn kinds(&self) -> Vec<&NodeKind> {
        let nodes = &self.request.plan.nodes;
        chain(self.request.plan, self.id).into_iter().map(|id| &nodes[id].kind).collect()
    }

    fn grouped(&self) -> bool {
        self.kinds().iter().any(|kind| matches!(kind, NodeKind::Group(_)))
    }

    fn stateful(&self) -> bool {
        self.kinds().iter().any(|kind| matches!(kind, NodeKind::Over(_) | NodeKind::Group(_)))
    }

    /// Whether the view's rows become final, so that late rows are not in it.
    fn closes(&self) -> bool {
        self.stateful() && self.request.plan.reach(self.id).is_some()
    }

    fn is_backup(&self) -> bool {
        let input = self.request.catalog.sink(&self.sink.name).map(|sink| &sink.input);
        matches!(input, Some(SinkInput::Relation { name, .. }) if *name == self.source.name)
    }

    async fn delta(&self, location: &str, mode: &Mode, report: &mut Report) -> Result<()> {
        let committed = self.pinned(location, &self.sink.name).await?.0;
        let (backup, state) = self.backup_version(&committed, report).await?;
        self.changed_sql(&state.manifest, report);
        let until = match (mode, self.stateful()) {
            (Mode::Append, true) => Some(committed.complete_until.unwrap_or(Micros::MIN)),
            _ => None,
        };
        let common = self.common(&committed, backup.as_ref(), until, report)?;
        self.incomplete(common.until, report);
        let left_out = self.left_out(&state, report).await?;
        let cut = |late: bool| -> Result<Cut> {
            let without = if late { left_out.all()? } else { left_out.without_late()? };
            Ok(match &backup {
                Some(backup) => Cut {
                    version: Some(backup.version),
                    below: Some(common.below.clone()),
                    without: Some(without),
                },
                None => Cut::default(),
            })
        };
        let backfilled = match &backup {
            Some(backup) if *mode == Mode::Append => {
                let owner = state.manifest.state_id.to_string();
                self.backfilled((location, committed.version), backup, &owner, report).await?
            }
            _ => Backfilled::default(),
        };
        let session = batch_session_within(self.request.memory)?;
        let table = session.read_table(provider_as_of(location, AsOf::Version(committed.version)).await?)?;
        let mut columns: Vec<Expr> =
            self.sink.schema.fields().iter().map(|field| ident(field.name())).collect();
        let weight = if *mode == Mode::Changelog { "\"_weight\"" } else { "1" };
        if *mode == Mode::Changelog {
            columns.push(ident("_weight"));
        }
        session.register_table("__table", table.select(columns)?.into_view())?;
        let stream = cut(true)?;
        let mut applying = self.answer(&session, &stream, None, report).await?;
        if let Some(inside) = self.inside(backfilled.known.iter().map(|(part, _)| *part)) {
            applying.frame = applying.frame.filter(inside.is_not_true())?;
            for (part, version) in &backfilled.known {
                let cut = self.cut_of(*version, &stream, &left_out).await?;
                let part = self.answer(&session, &cut, Some(*part), &mut Report::default()).await?;
                applying.frame = applying.frame.union(part.frame)?;
            }
        }
        session.register_table("__answer", applying.frame.into_view())?;
        let mut plan = self.plan(Side { name: "__table", weight }, common.until)?;
        plan.condition += &self.outside(&backfilled.unknown);
        plan.single_precision = applying.inexact;
        let key = |name: &String| self.sink.schema.index_of(name).ok();
        plan.key = mode.key().iter().filter_map(key).collect();
        report.compared = Some(compare(&session, &plan, &|_, _, _| false).await?);
        if backup.is_some() && left_out.late_rows() > 0 {
            let complete = self.answer(&session, &cut(false)?, None, &mut Report::default()).await?;
            session.register_table("__complete", complete.frame.into_view())?;
            plan.table = Side { name: "__complete", weight: "1" };
            // Where late rows count already.
            let known: Vec<Interval> = backfilled.known.iter().map(|(part, _)| *part).collect();
            plan.condition += &self.outside(&known);
            let late = compare(&session, &plan, &|_, _, _| false).await?;
            report.late_would_change = Some(late.differences());
        }
        Ok(())
    }

    /// Says up to where rows are compared, if not all that was asked for.
    fn incomplete(&self, until: Option<Micros>, report: &mut Report) {
        report.until = until.filter(|until| *until != END_OF_TIME && *until != Micros::MIN);
        let asked = self.request.to.zip(until);
        if asked.is_some_and(|(to, until)| to > until) {
            report.cannot_prove(match report.until {
                Some(until) => format!("rows from {} on: the sink is not complete there yet", shown(until)),
                None => "any row: none of the sink is final yet".to_owned(),
            });
        }
    }

    fn plan<'a>(&self, table: Side<'a>, until: Option<Micros>) -> Result<Plan<'a>> {
        let order = self.sink.order;
        let mut conditions = vec!["TRUE".to_owned()];
        // Nothing is final yet; the number itself is no literal of SQL.
        let until = until.map(|until| until.max(-i64::MAX));
        let ends = [
            (self.request.from, ">="),
            (self.request.to, "<"),
            (until.filter(|until| *until != END_OF_TIME), "<"),
        ];
        for (end, operator) in ends.iter().filter_map(|(end, operator)| Some(((*end)?, operator))) {
            let Some(order) = order else {
                return Err(Error::user(format!("the rows of {} have no time", self.sink.name))
                    .hint("Leave --from and --to out."));
            };
            conditions.push(bound(self.sink.schema.field(order).name(), operator, end));
        }
        if let Some(share) = self.request.sample {
            conditions.push(self.sampled(share));
        }
        Ok(Plan {
            table,
            answer: Side { name: "__answer", weight: "1" },
            columns: Arc::clone(&self.sink.schema),
            condition: conditions.join(" AND "),
            key: Vec::new(),
            order,
            single_precision: false,
            shown: self.request.shown,
        })
    }

    /// The same rows on both sides: those of which the hash of the key is small.
    fn sampled(&self, share: f64) -> String {
        let texts: Vec<String> =
            self.sample_key().iter().map(|name| format!("CAST({} AS VARCHAR)", quote(name))).collect();
        let most = (share * f64::from(SAMPLE_PARTS)).ceil().min(f64::from(SAMPLE_PARTS)) as u32;
        let below = match most {
            SAMPLE_PARTS => "g".to_owned(),
            most => format!("{most:04x}"),
        };
        format!("left(md5(concat_ws('|', {})), 4) < '{below}'", texts.join(", "))
    }

    /// The sink's key; else the columns of the sink that are named as the keys of the view's state, so that what is left
    /// out is left out below it; else the time.
    fn sample_key(&self) -> Vec<String> {
        let fields = self.sink.schema.fields();
        match &self.sink.kind {
            SinkKind::Delta(config) if !config.mode.key().is_empty() => return config.mode.key().to_vec(),
            _ if !self.sink.key.is_empty() => {
                return self.sink.key.iter().map(|at| fields[*at].name().clone()).collect();
            }
            _ => {}
        }
        let names = self.kinds().into_iter().find_map(|kind| match kind {
            NodeKind::Over(spec) => Some((&spec.input, &spec.partition_by)),
            NodeKind::Group(spec) => Some((&spec.input, &spec.keys)),
            _ => None,
        });
        let stored = |name: &String| fields.iter().any(|field| field.name() == name);
        let names = names.map(|(input, columns)| {
            columns.iter().map(|at| input.field(*at).name().clone()).filter(stored).collect::<Vec<_>>()
        });
        match (names.filter(|names| !names.is_empty()), self.sink.order) {
            (Some(names), _) => names,
            (None, Some(order)) => vec![fields[order].name().clone()],
            (None, None) => fields.iter().take(1).map(|field| field.name().clone()).collect(),
        }
    }
}

/// A condition on a column of times, as SQL.
fn bound(column: &str, operator: &str, end: Micros) -> String {
    let kind = "'Timestamp(Microsecond, Some(\"UTC\"))'";
    format!("arrow_cast({}, {kind}) {operator} arrow_cast({end}, {kind})", quote(column))
}

/// A time as people read it.
pub fn shown(micros: Micros) -> String {
    let time = chrono::DateTime::from_timestamp_micros(micros);
    time.map_or_else(|| micros.to_string(), |time| time.format("%Y-%m-%dT%H:%M:%S%.fZ").to_string())
}
