//! One sorted stream of batches → the same batches with the results of the calls behind their columns.
//!
//! Rows are numbered from the start of the stream. A *group* is a run of peers: rows of one partition with the same order.
//! It is complete when a row of another group has come; then its frames are known, and all its rows have the same results.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch, RecordBatchOptions};
use arrow::compute::{cast, concat, partition};
use arrow::datatypes::{DataType, Int64Type, SchemaRef};
use datafusion::common::{Result, internal_datafusion_err};
use datafusion::physical_expr::PhysicalExpr;

use super::kernels::{Kernel, Values};
use super::spec::{Frame, Spec};

/// A run of peers.
#[derive(Debug, Clone, Copy)]
pub struct Group {
    pub first: usize,
    pub end: usize,
    /// The first one of its partition.
    pub fresh: bool,
    /// Its order is NULL. Only known where a frame is bounded.
    null: bool,
}

/// Results of consecutive rows, a column per call.
struct Answer {
    first: usize,
    columns: Vec<ArrayRef>,
}

pub struct Run {
    spec: Arc<Spec>,
    schema: SchemaRef,
    kernels: Vec<Box<dyn Kernel>>,
    /// Batches whose rows are not out, with the number of their first row.
    waiting: VecDeque<(usize, RecordBatch)>,
    answers: VecDeque<Answer>,
    /// Rows that came.
    rows: usize,
    /// Rows that are answered.
    answered: usize,
    /// The group that the last row belongs to; more of it may come.
    open: Option<Group>,
    /// Keys and order of the last row.
    last: Option<Vec<ArrayRef>>,
    /// The order, where a frame is bounded.
    times: Option<Values<i64>>,
    /// The first row of each frame of the last group, and whether its order was NULL.
    starts: Vec<usize>,
    null: bool,
    finished: bool,
}

impl Run {
    pub fn new(spec: &Arc<Spec>, schema: SchemaRef) -> Result<Self> {
        let bounded = spec.frames.iter().any(|frame| matches!(frame, Frame::Back(_)));
        Ok(Self {
            kernels: spec.calls.iter().map(|call| spec.kernel(call)).collect::<Result<_>>()?,
            waiting: VecDeque::new(),
            answers: VecDeque::new(),
            rows: 0,
            answered: 0,
            open: None,
            last: None,
            times: bounded.then(Values::default),
            starts: vec![0; spec.frames.len()],
            null: false,
            finished: false,
            spec: Arc::clone(spec),
            schema,
        })
    }

    /// Takes the next batch of the input.
    ///
    /// # Errors
    /// An expression fails.
    pub fn push(&mut self, batch: RecordBatch) -> Result<()> {
        let rows = batch.num_rows();
        if rows == 0 {
            return Ok(());
        }
        let spec = Arc::clone(&self.spec);
        let (keys, order) = (arrays(&spec.keys, &batch)?, arrays(&spec.order, &batch)?);
        for (call, kernel) in spec.calls.iter().zip(&mut self.kernels) {
            kernel.extend(&arrays(&call.args, &batch)?, rows)?;
        }
        if let Some(times) = &mut self.times {
            times.put(cast(&order[0], &DataType::Int64)?.as_primitive::<Int64Type>().values(), None);
        }
        let complete = self.groups(keys, &order, rows)?;
        self.waiting.push_back((self.rows, batch));
        self.rows += rows;
        self.answer(&complete)
    }

    /// No more batches come.
    ///
    /// # Errors
    /// Internal only.
    pub fn finish(&mut self) -> Result<()> {
        let rest: Vec<Group> = self.open.take().into_iter().collect();
        self.finished = true;
        self.answer(&rest)
    }

    pub fn is_finished(&self) -> bool {
        self.finished
    }

    /// Bytes held.
    pub fn size(&self) -> usize {
        let waiting: usize = self.waiting.iter().map(|(_, batch)| batch.get_array_memory_size()).sum();
        let times = self.times.as_ref().map_or(0, Values::size);
        waiting + times + self.kernels.iter().map(|kernel| kernel.size()).sum::<usize>()
    }

    /// The next batch all of whose rows are answered.
    ///
    /// # Errors
    /// Internal only.
    pub fn next(&mut self) -> Result<Option<RecordBatch>> {
        let Some((first, batch)) = self.waiting.front() else { return Ok(None) };
        let (first, end) = (*first, first + batch.num_rows());
        if end > self.answered {
            return Ok(None);
        }
        let mut columns = batch.columns().to_vec();
        for at in 0..self.kernels.len() {
            let pieces = self.answers.iter().filter_map(|answer| answer.piece(at, first..end));
            let pieces: Vec<ArrayRef> = pieces.collect();
            columns.push(match &pieces[..] {
                [whole] => Arc::clone(whole),
                pieces => concat(&pieces.iter().map(AsRef::as_ref).collect::<Vec<_>>())?,
            });
        }
        while self.answers.front().is_some_and(|answer| answer.end() <= end) {
            self.answers.pop_front();
        }
        self.waiting.pop_front();
        let options = RecordBatchOptions::new().with_row_count(Some(end - first));
        Ok(Some(RecordBatch::try_new_with_options(Arc::clone(&self.schema), columns, &options)?))
    }

    /// The groups that are complete now that these rows have come.
    fn groups(&mut self, keys: Vec<ArrayRef>, order: &[ArrayRef], rows: usize) -> Result<Vec<Group>> {
        let partitions: Vec<usize> = match keys.is_empty() {
            true => vec![0],
            false => partition(&keys)?.ranges().iter().map(|range| range.start).collect(),
        };
        let count = keys.len();
        let mut columns = keys;
        columns.extend(order.iter().cloned());
        let (same_keys, peers) = self.continues(&columns, count)?;
        let nulls = self.times.as_ref().and_then(|_| order[0].logical_nulls());
        let mut partitions = partitions.into_iter().peekable();
        let ranges = partition(&columns)?.ranges();
        let mut complete = Vec::with_capacity(ranges.len());
        for Range { start, end } in ranges {
            let first_of_keys = partitions.next_if_eq(&start).is_some();
            let end = self.rows + end;
            match &mut self.open {
                Some(open) if start == 0 && peers => open.end = end,
                open => {
                    complete.extend(open.take());
                    let fresh = first_of_keys && !(start == 0 && same_keys);
                    let null = nulls.as_ref().is_some_and(|nulls| nulls.is_null(start));
                    *open = Some(Group { first: self.rows + start, end, fresh, null });
                }
            }
        }
        // Of its own, so that it does not keep the batch.
        let last = columns.iter().map(|column| concat(&[&column.slice(rows - 1, 1)]));
        self.last = Some(last.collect::<std::result::Result<_, _>>()?);
        Ok(complete)
    }

    /// Whether the first row has the keys of the last one, and its order too.
    fn continues(&self, columns: &[ArrayRef], keys: usize) -> Result<(bool, bool)> {
        let Some(last) = &self.last else { return Ok((false, false)) };
        let pair = |(last, column): (&ArrayRef, &ArrayRef)| concat(&[last, &column.slice(0, 1)]);
        let pairs: Vec<ArrayRef> =
            last.iter().zip(columns).map(pair).collect::<std::result::Result<_, _>>()?;
        let same_keys = keys == 0 || partition(&pairs[..keys])?.len() == 1;
        Ok((same_keys, same_keys && partition(&pairs[keys..])?.len() == 1))
    }

    /// Computes the results of complete groups, and lets go of what no frame needs any more.
    fn answer(&mut self, groups: &[Group]) -> Result<()> {
        let (Some(first), Some(last)) = (groups.first(), groups.last()) else { return Ok(()) };
        let frames = self.spec.frames.iter().zip(&mut self.starts);
        let starts: Vec<Vec<usize>> = frames
            .map(|(frame, start)| starts(*frame, start, groups, self.null, self.times.as_ref()))
            .collect();
        let calls = self.spec.calls.iter().zip(&mut self.kernels);
        let column = |(call, kernel): (&super::spec::Call, &mut Box<dyn Kernel>)| {
            kernel.answer(groups, &starts[call.frame], last.end - first.first)
        };
        let columns = calls.map(column).collect::<Result<Vec<_>>>()?;
        if columns.iter().any(|column| column.len() != last.end - first.first) {
            return Err(internal_datafusion_err!("a window has lost rows"));
        }
        self.answers.push_back(Answer { first: first.first, columns });
        (self.answered, self.null) = (last.end, last.null);
        for (call, kernel) in self.spec.calls.iter().zip(&mut self.kernels) {
            kernel.forget(match self.spec.frames[call.frame] {
                Frame::Unbounded => last.end,
                _ => self.starts[call.frame],
            });
        }
        let bounded = self.spec.frames.iter().zip(&self.starts);
        let bounded = bounded.filter(|(frame, _)| matches!(frame, Frame::Back(_)));
        if let (Some(times), Some(needed)) = (&mut self.times, bounded.map(|(_, start)| *start).min()) {
            times.forget(needed);
        }
        Ok(())
    }
}

impl Answer {
    fn end(&self) -> usize {
        self.first + self.columns.first().map_or(0, |column| column.len())
    }

    /// What it has of some rows.
    fn piece(&self, call: usize, rows: Range<usize>) -> Option<ArrayRef> {
        let (first, end) = (rows.start.max(self.first), rows.end.min(self.end()));
        (first < end).then(|| self.columns[call].slice(first - self.first, end - first))
    }
}

fn arrays(exprs: &[Arc<dyn PhysicalExpr>], batch: &RecordBatch) -> Result<Vec<ArrayRef>> {
    exprs.iter().map(|expr| expr.evaluate(batch)?.into_array(batch.num_rows())).collect()
}

/// The first row of the frame of each group; `start` is that of the group before them, whose order was NULL or not.
fn starts(
    frame: Frame,
    start: &mut usize,
    groups: &[Group],
    mut null: bool,
    times: Option<&Values<i64>>,
) -> Vec<usize> {
    let one = |group: &Group| {
        match (frame, times) {
            (Frame::Back(back), Some(times)) => {
                // NULLs are peers of each other and of nothing else, at whichever end they are.
                if group.fresh || group.null || null {
                    *start = group.first;
                }
                let from = times.get(group.first).saturating_sub(back);
                while *start < group.first && times.get(*start) < from {
                    *start += 1;
                }
                null = group.null;
            }
            (Frame::Unbounded, _) if !group.fresh => {}
            _ => *start = group.first,
        }
        *start
    };
    groups.iter().map(one).collect()
}
