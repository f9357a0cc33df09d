//! GROUP BY a window: a table per window, dropped whole when the watermark closes it.
//!
//! # Meaning
//! One key column of the GROUP BY is derived from the event time such that a row with value v has event time
//! < v + `bound` ([`Closing`]): the start of a TUMBLE or HOP window, `date_trunc`, the time itself. At watermark W the
//! groups with v + `bound` ≤ W can no longer change: they are the emission `final`, in the order of v, and their state
//! goes. `changes` and `latest` say nothing at that moment, what they said stands.
//!
//! The time of a group's row is v, of all emissions; behind the operator the watermark is W − `bound` + 1 µs, as no row
//! with a smaller v follows. So windows can be stacked on windows.
//!
//! Without a [`Closing`] there is one table that never closes.

use std::collections::BTreeMap;

use arrow::array::{
    Array, ArrayRef, AsArray, Int64Array, RecordBatch, TimestampMicrosecondArray, UInt32Array,
};
use arrow::compute::{cast, concat_batches};
use arrow::datatypes::{DataType, Int64Type, TimeUnit, TimestampMicrosecondType};

use super::{Group, GroupSpec, ORIGIN, Pushed};
use crate::error::{Error, Result};
use crate::stream::{ChangeBatch, END_OF_TIME, Micros, START_OF_TIME};

/// Which key closes groups, and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Closing {
    /// Its place among the keys; a `Timestamp` column in µs or ns.
    pub key: usize,
    /// µs: event time < value + bound.
    pub bound: Micros,
}

impl Closing {
    /// The windows in a key column, µs.
    ///
    /// # Errors
    /// Internal: the column is no time, or has NULLs.
    pub fn windows(&self, column: &ArrayRef) -> Result<TimestampMicrosecondArray> {
        let wrong = || Error::internal("a window's key is no time or NULL");
        let DataType::Timestamp(_, zone) = column.data_type() else { return Err(wrong()) };
        let micros = cast(column, &DataType::Timestamp(TimeUnit::Microsecond, zone.clone()))?;
        let windows = micros.as_primitive::<TimestampMicrosecondType>();
        if windows.null_count() == 0 { Ok(windows.clone()) } else { Err(wrong()) }
    }
}

/// The tables of one shard.
pub struct Panes {
    spec: GroupSpec,
    panes: BTreeMap<Micros, Group>,
    watermark: Micros,
}

impl Panes {
    /// # Errors
    /// As [`Group::new`].
    pub fn new(spec: GroupSpec) -> Result<Self> {
        let mut panes = BTreeMap::new();
        if spec.closing.is_none() {
            panes.insert(START_OF_TIME, Group::new(spec.clone())?);
        }
        Ok(Self { spec, panes, watermark: START_OF_TIME })
    }

    /// Takes rows in; returns what they did.
    ///
    /// # Errors
    /// User: an aggregate overflowed. Internal: rows with weights, rows of a closed window.
    pub fn push(&mut self, batch: &ChangeBatch) -> Result<Pushed> {
        if batch.num_rows() == 0 {
            return Ok(Pushed::default());
        }
        let Some(closing) = self.spec.closing else { return self.pane(START_OF_TIME)?.push(batch) };
        let windows = closing.windows(batch.rows.column(self.spec.keys[closing.key]))?;
        let (mut changes, mut latest) = (Vec::new(), Vec::new());
        for (window, rows) in split(windows.values()) {
            if closes(window, closing.bound, self.watermark) {
                return Err(Error::internal("a row came after its window was closed"));
            }
            let pushed = match rows {
                None => self.pane(window)?.push(batch)?,
                Some(rows) => self.pane(window)?.push(&batch.take(&rows)?)?,
            };
            changes.extend(pushed.changes);
            latest.extend(pushed.latest);
        }
        Ok(Pushed { changes: joined(changes)?, latest: joined(latest)? })
    }

    /// The final rows of the windows that `watermark` closes, in order.
    ///
    /// # Errors
    /// Internal, from arrow.
    pub fn advance(&mut self, watermark: Micros) -> Result<Vec<ChangeBatch>> {
        self.watermark = self.watermark.max(watermark);
        let Some(closing) = self.spec.closing else { return Ok(Vec::new()) };
        let mut rows = Vec::new();
        while let Some(first) = self.panes.first_entry()
            && closes(*first.key(), closing.bound, self.watermark)
        {
            let group = first.remove();
            if self.spec.want_final {
                rows.push(group.all()?);
            }
        }
        Ok(rows)
    }

    /// The watermark behind the operator.
    pub fn watermark_out(&self) -> Micros {
        match self.spec.closing {
            Some(closing) if self.watermark != START_OF_TIME && self.watermark != END_OF_TIME => {
                self.watermark.saturating_sub(closing.bound).saturating_add(1)
            }
            _ => self.watermark,
        }
    }

    pub fn watermark(&self) -> Micros {
        self.watermark
    }

    /// Groups held.
    pub fn len(&self) -> usize {
        self.panes.values().map(Group::len).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// State rows touched since the last snapshot, or all of them; `None` when there are none.
    ///
    /// # Errors
    /// Internal, from arrow.
    pub fn snapshot(&mut self, full: bool) -> Result<Option<RecordBatch>> {
        let parts = self.panes.values_mut().map(|group| group.snapshot(full));
        let parts: Vec<RecordBatch> = parts.filter_map(Result::transpose).collect::<Result<_>>()?;
        let Some(first) = parts.first() else { return Ok(None) };
        Ok(Some(concat_batches(first.schema_ref(), &parts)?))
    }

    /// The columns of a snapshot by which rows are dealt out to shards.
    pub fn key_columns(&self) -> &[usize] {
        &self.spec.exchange
    }

    /// Puts back what snapshots hold, later batches win; windows closed at `watermark` are left out.
    ///
    /// # Errors
    /// External: the snapshot has another layout, as that of another version or of other SQL.
    pub fn restore(&mut self, batches: &[RecordBatch], watermark: Micros) -> Result<()> {
        self.watermark = watermark;
        for batch in batches {
            let Some(closing) = self.spec.closing else {
                self.pane(START_OF_TIME)?.restore(std::slice::from_ref(batch))?;
                continue;
            };
            let time =
                batch.column_by_name(ORIGIN[0]).and_then(|column| column.as_primitive_opt::<Int64Type>());
            let time = time.ok_or_else(super::misfit)?;
            for (window, rows) in split(time.values()) {
                if closes(window, closing.bound, watermark) {
                    continue;
                }
                let part = match rows {
                    None => batch.clone(),
                    Some(rows) => arrow::compute::take_record_batch(batch, &rows)?,
                };
                self.pane(window)?.restore(&[part])?;
            }
        }
        Ok(())
    }

    fn pane(&mut self, window: Micros) -> Result<&mut Group> {
        use std::collections::btree_map::Entry;
        match self.panes.entry(window) {
            Entry::Occupied(pane) => Ok(pane.into_mut()),
            Entry::Vacant(pane) => {
                let mut group = Group::new(self.spec.clone())?;
                group.window = Some(window);
                Ok(pane.insert(group))
            }
        }
    }
}

fn closes(window: Micros, bound: Micros, watermark: Micros) -> bool {
    watermark == END_OF_TIME || window.saturating_add(bound) <= watermark
}

/// Rows by value, values ascending; `None` where all rows have it.
fn split(values: &[i64]) -> Vec<(i64, Option<UInt32Array>)> {
    match values {
        [] => return Vec::new(),
        [first, rest @ ..] if rest.iter().all(|value| value == first) => return vec![(*first, None)],
        _ => {}
    }
    let mut rows: Vec<u32> = (0..values.len() as u32).collect();
    rows.sort_by_key(|row| values[*row as usize]);
    let same = |a: &u32, b: &u32| values[*a as usize] == values[*b as usize];
    rows.chunk_by(same).map(|run| (values[run[0] as usize], Some(UInt32Array::from(run.to_vec())))).collect()
}

fn joined(parts: Vec<ChangeBatch>) -> Result<Option<ChangeBatch>> {
    let Some(first) = parts.first() else { return Ok(None) };
    if parts.len() == 1 {
        return Ok(parts.into_iter().next());
    }
    let schema = first.rows.schema();
    let weighted = parts.iter().any(|part| part.weights.is_some());
    let weights = weighted.then(|| {
        let each = parts.iter().flat_map(|part| {
            (0..part.num_rows()).map(|row| part.weights.as_ref().map_or(1, |weights| weights.value(row)))
        });
        Int64Array::from_iter_values(each)
    });
    let plain: Vec<ChangeBatch> =
        parts.into_iter().map(|part| ChangeBatch { weights: None, ..part }).collect();
    Ok(Some(ChangeBatch { weights, ..ChangeBatch::concat(&schema, &plain)? }))
}
