//! Expected and found rows as bags, and their difference for people.

use std::collections::{BTreeMap, VecDeque};

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Float64Type};
use arrow::util::display::{ArrayFormatter, FormatOptions};

use crate::error::Result;

/// Floats may differ by this, relative to the larger one, where a fixture says nothing: sums are exact, but variances and
/// the like depend on the order of merges.
pub const TOLERANCE: f64 = 1e-12;
/// Rows of a difference that are shown.
const SHOWN: usize = 40;
/// Characters of a value that are shown.
const WIDTH: usize = 60;

#[derive(Debug, Clone, PartialEq)]
pub enum Cell {
    Null,
    Float(f64),
    Text(String),
}

pub type Row = Vec<Cell>;

/// The rows of a batch, columns by index.
///
/// # Errors
/// Internal: a type that arrow does not show.
pub fn cells(batch: &RecordBatch, columns: &[usize]) -> Result<Vec<Row>> {
    let mut rows = vec![Vec::with_capacity(columns.len()); batch.num_rows()];
    for column in columns {
        let column = column_cells(batch.column(*column))?;
        rows.iter_mut().zip(column).for_each(|(row, cell)| row.push(cell));
    }
    Ok(rows)
}

fn column_cells(array: &ArrayRef) -> Result<Vec<Cell>> {
    let rows = 0..array.len();
    if matches!(array.data_type(), DataType::Float16 | DataType::Float32 | DataType::Float64) {
        let floats = cast(array, &DataType::Float64)?;
        let floats = floats.as_primitive::<Float64Type>();
        let cell = |row| if floats.is_null(row) { Cell::Null } else { Cell::Float(floats.value(row)) };
        return Ok(rows.map(cell).collect());
    }
    let options = FormatOptions::default();
    let formatter = ArrayFormatter::try_new(array, &options)?;
    let cell =
        |row| if array.is_null(row) { Cell::Null } else { Cell::Text(formatter.value(row).to_string()) };
    Ok(rows.map(cell).collect())
}

/// What a fixture wants of a relation.
#[derive(Debug, Clone)]
pub struct Wanted {
    pub columns: Vec<String>,
    pub rows: Vec<Row>,
    /// Which columns of each row count.
    pub named: Vec<Vec<bool>>,
    /// More rows are fine.
    pub partial: bool,
    pub tolerance: f64,
}

#[derive(Debug, Default, PartialEq)]
pub struct Difference {
    pub missing: Vec<(Row, Vec<bool>)>,
    /// In a partial comparison: rows that nothing was compared with.
    pub others: Vec<Row>,
}

impl Wanted {
    pub fn matches(&self, wanted: usize, found: &Row) -> bool {
        let pairs = self.rows[wanted].iter().zip(found).zip(&self.named[wanted]);
        pairs.into_iter().all(|((a, b), named)| !named || same(a, b, self.tolerance))
    }

    /// `None` when the found rows are what is wanted.
    pub fn compare(&self, found: &[Row]) -> Option<Difference> {
        let mut pairs = vec![None; self.rows.len()];
        if self.partial {
            let all: Vec<usize> = (0..self.rows.len()).collect();
            let candidates: Vec<usize> = (0..found.len()).collect();
            self.pair(&all, &candidates, found, &mut pairs);
        } else {
            // Rows that match agree in all but their floats.
            let mut buckets: BTreeMap<String, (Vec<usize>, Vec<usize>)> = BTreeMap::new();
            for (at, row) in self.rows.iter().enumerate() {
                buckets.entry(coarse(row)).or_default().0.push(at);
            }
            for (at, row) in found.iter().enumerate() {
                buckets.entry(coarse(row)).or_default().1.push(at);
            }
            for (wanted, candidates) in buckets.values() {
                self.pair(wanted, candidates, found, &mut pairs);
            }
        }
        let mut taken = vec![false; found.len()];
        pairs.iter().flatten().for_each(|at: &usize| taken[*at] = true);
        let unpaired = pairs.iter().enumerate().filter(|(_, pair)| pair.is_none());
        let missing = unpaired.map(|(at, _)| (self.rows[at].clone(), self.named[at].clone())).collect();
        let others =
            found.iter().zip(taken).filter(|(_, taken)| !taken).map(|(row, _)| row.clone()).collect();
        let difference = Difference { missing, others };
        let fine = difference.missing.is_empty() && (self.partial || difference.others.is_empty());
        (!fine).then_some(difference)
    }

    /// As many pairs as possible, by augmenting paths.
    fn pair(&self, wanted: &[usize], candidates: &[usize], found: &[Row], pairs: &mut [Option<usize>]) {
        let mut owner: BTreeMap<usize, usize> = BTreeMap::new();
        for start in wanted {
            // From which wanted row each candidate was reached.
            let mut from: BTreeMap<usize, usize> = BTreeMap::new();
            let mut queue = VecDeque::from([*start]);
            let mut free = None;
            'search: while let Some(at) = queue.pop_front() {
                for candidate in candidates {
                    if from.contains_key(candidate) || !self.matches(at, &found[*candidate]) {
                        continue;
                    }
                    from.insert(*candidate, at);
                    match owner.get(candidate) {
                        Some(other) => queue.push_back(*other),
                        None => {
                            free = Some(*candidate);
                            break 'search;
                        }
                    }
                }
            }
            while let Some(candidate) = free {
                let Some(at) = from.get(&candidate) else { break };
                free = pairs[*at].replace(candidate);
                owner.insert(candidate, *at);
            }
        }
    }
}

fn same(a: &Cell, b: &Cell, tolerance: f64) -> bool {
    match (a, b) {
        (Cell::Float(a), Cell::Float(b)) => {
            a == b
                || a.is_nan() && b.is_nan()
                || (a - b).abs() <= tolerance * a.abs().max(b.abs()).max(1.0) && (a - b).is_finite()
        }
        (a, b) => a == b,
    }
}

/// The row without its floats.
fn coarse(row: &Row) -> String {
    let word = |cell: &Cell| match cell {
        Cell::Null => "n".to_owned(),
        Cell::Float(_) => "f".to_owned(),
        Cell::Text(text) => format!("t{}:{text}", text.len()),
    };
    row.iter().map(word).collect()
}

fn shown(cell: &Cell) -> String {
    let text = match cell {
        Cell::Null => "NULL".to_owned(),
        Cell::Float(value) => value.to_string(),
        Cell::Text(text) => text.clone(),
    };
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    match text.char_indices().nth(WIDTH) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

impl Difference {
    /// In words.
    pub fn summary(&self, partial: bool) -> String {
        let rows = |count: usize| format!("{count} {}", if count == 1 { "row" } else { "rows" });
        let missing = (!self.missing.is_empty()).then(|| format!("{} missing (-)", rows(self.missing.len())));
        let others = (!partial && !self.others.is_empty())
            .then(|| format!("{} not expected (+)", rows(self.others.len())));
        missing.into_iter().chain(others).collect::<Vec<_>>().join(", ")
    }

    /// The rows as an aligned table, each missing one above the found one that is most like it. In a partial
    /// comparison found rows have no mark.
    pub fn table(&self, columns: &[String], partial: bool) -> String {
        let blank = |(row, named): &(Row, Vec<bool>)| {
            let cell = |(cell, named): (&Cell, &bool)| if *named { shown(cell) } else { String::new() };
            row.iter().zip(named).map(cell).collect::<Vec<_>>()
        };
        let mark = if partial { ' ' } else { '+' };
        let mut missing: Vec<Vec<String>> = self.missing.iter().map(blank).collect();
        let mut others: Vec<Vec<String>> =
            self.others.iter().map(|row| row.iter().map(shown).collect()).collect();
        missing.sort();
        others.sort();
        let mut lines: Vec<(Vec<String>, char)> = Vec::new();
        for row in missing.into_iter().take(SHOWN) {
            let alike = |other: &[String]| row.iter().zip(other).filter(|(a, b)| a == b).count();
            let near = (0..others.len().min(SHOWN)).rev().max_by_key(|at| alike(&others[*at]));
            let near = near.filter(|at| alike(&others[*at]) > 0).map(|at| others.remove(at));
            lines.push((row, '-'));
            lines.extend(near.map(|row| (row, mark)));
        }
        lines.extend(others.into_iter().map(|row| (row, mark)));
        let hidden = (self.missing.len() + self.others.len()).saturating_sub(SHOWN.min(lines.len()));
        lines.truncate(SHOWN);
        lines.insert(0, (columns.to_vec(), ' '));
        let width = |column: usize| {
            lines.iter().map(|(cells, _)| cells[column].chars().count()).max().unwrap_or_default()
        };
        let widths: Vec<usize> = (0..columns.len()).map(width).collect();
        let mut out = String::new();
        for (cells, mark) in &lines {
            let padded = cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
            let line = format!("{mark} {}", padded.collect::<Vec<_>>().join("  "));
            out.push_str(line.trim_end());
            out.push('\n');
        }
        if hidden > 0 {
            out.push_str(&format!("  … and {hidden} more\n"));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(text: &str) -> Row {
        let cell = |word: &str| match word {
            "_" => Cell::Null,
            word => word.parse().map_or_else(|_| Cell::Text(word.to_owned()), Cell::Float),
        };
        text.split(' ').map(cell).collect()
    }

    fn wanted(rows: &[&str], partial: bool) -> Wanted {
        let rows: Vec<Row> = rows.iter().map(|text| row(text)).collect();
        let named =
            rows.iter().map(|row| row.iter().map(|c| !partial || *c != Cell::Null).collect()).collect();
        let columns = vec!["name".to_owned(), "x".to_owned()];
        Wanted { columns, rows, named, partial, tolerance: TOLERANCE }
    }

    fn found(rows: &[&str]) -> Vec<Row> {
        rows.iter().map(|text| row(text)).collect()
    }

    #[test]
    fn bags_are_equal_in_any_order_and_within_the_tolerance() {
        let want = wanted(&["a 1", "b _", "a 1", "c NaN"], false);
        assert_eq!(want.compare(&found(&["c NaN", "a 1.0000000000000002", "b _", "a 1"])), None);
        let difference = want.compare(&found(&["a 1", "b _", "b 0", "c 1"])).unwrap();
        assert_eq!(difference.summary(false), "2 rows missing (-), 2 rows not expected (+)");
        let table = difference.table(&want.columns, false);
        assert_eq!(table, "  name  x\n- a     1\n+ c     1\n- c     NaN\n+ b     0\n");
    }

    #[test]
    fn partial_rows_find_a_row_each() {
        // The first one must leave its first choice to the second.
        let want = wanted(&["a _", "a 1"], true);
        assert_eq!(want.compare(&found(&["a 1", "a 2", "z 9"])), None);
        let difference = want.compare(&found(&["a 1", "z 9"])).unwrap();
        assert_eq!((difference.missing.len(), difference.others.len()), (1, 1));
        assert_eq!(difference.table(&want.columns, true).lines().count(), 3);
        assert!(want.compare(&[]).is_some());
    }

    #[test]
    fn large_bags_are_cut_for_show() {
        let many: Vec<String> = (0..100).map(|n| format!("n{n} {n}")).collect();
        let want = wanted(&[], false);
        let rows: Vec<Row> = many.iter().map(|text| row(text)).collect();
        let table = want.compare(&rows).unwrap().table(&want.columns, false);
        assert_eq!(table.lines().count(), SHOWN + 2);
        assert!(table.ends_with("… and 60 more\n"));
    }
}
