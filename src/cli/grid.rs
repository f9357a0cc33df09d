//! A table of rows that fits a terminal.
//!
//! If it is wider, the widest columns are cut, none below [`NARROW`]; if that is not enough, columns in the middle are left
//! out. A plan (cells of several lines) is text below its heading instead.

use std::sync::Arc;

use arrow::util::display::{ArrayFormatter, FormatOptions};
use unicode_width::UnicodeWidthStr;

use super::output::{self, Format};
use super::table::cut;
use crate::batch::Answer;
use crate::connectors::formats::json_encode::with_texts;
use crate::error::Result;

/// No column is made narrower than this.
const NARROW: usize = 8;

pub struct Grid {
    pub text: String,
    /// Columns that had no room.
    pub left_out: Vec<String>,
}

/// # Errors
/// Internal, from arrow.
pub fn of(answer: &Answer, width: usize) -> Result<Grid> {
    let mut columns = cells(answer)?;
    let widths: Vec<usize> = columns.iter().map(|column| widest(column)).collect();
    if total(&widths) <= width {
        let bytes = output::encoded(answer, Format::Table)?;
        return Ok(Grid { text: String::from_utf8_lossy(&bytes).into_owned(), left_out: Vec::new() });
    }
    if columns.iter().flatten().any(|cell| cell.contains('\n')) {
        return Ok(Grid { text: paragraphs(&columns), left_out: Vec::new() });
    }
    // Those in the middle go first: keys stand at the beginning.
    let mut kept: Vec<usize> = (0..columns.len()).collect();
    let least = |kept: &[usize]| {
        let gap = if kept.len() < columns.len() { 1 } else { 0 };
        let narrow = kept.iter().map(|at| widths[*at].min(NARROW)).chain(std::iter::repeat_n(1, gap));
        total(&narrow.collect::<Vec<_>>())
    };
    while least(&kept) > width && kept.len() > 2 {
        kept.remove(kept.len() / 2);
    }
    let left_out =
        (0..columns.len()).filter(|at| !kept.contains(at)).map(|at| columns[at][0].clone()).collect();
    let gap = kept.iter().enumerate().position(|(at, kept)| at != *kept);
    let mut widths: Vec<usize> = kept.iter().map(|at| widths[*at]).collect();
    let mut columns: Vec<Vec<String>> = kept.into_iter().map(|at| std::mem::take(&mut columns[at])).collect();
    if let Some(at) = gap {
        let rows = columns[0].len();
        columns.insert(at, vec!["…".to_owned(); rows]);
        widths.insert(at, 1);
    }
    shrink(&mut widths, width);
    Ok(Grid { text: boxed(&columns, &widths), left_out })
}

/// Head and cells of every column.
fn cells(answer: &Answer) -> Result<Vec<Vec<String>>> {
    let mut columns: Vec<Vec<String>> =
        answer.schema.fields().iter().map(|field| vec![field.name().clone()]).collect();
    let options = FormatOptions::default();
    for batch in &answer.batches {
        let batch = with_texts(batch)?;
        for (cells, array) in columns.iter_mut().zip(batch.columns()) {
            let format = ArrayFormatter::try_new(Arc::as_ref(array), &options)?;
            cells.extend((0..batch.num_rows()).map(|row| format.value(row).to_string()));
        }
    }
    Ok(columns)
}

fn widest(cells: &[String]) -> usize {
    cells.iter().flat_map(|cell| cell.split('\n')).map(UnicodeWidthStr::width).max().unwrap_or(0)
}

/// With lines between columns and a blank at each side.
fn total(widths: &[usize]) -> usize {
    widths.iter().sum::<usize>() + 3 * widths.len() + 1
}

/// Takes from the widest columns until the table fits or all are narrow.
fn shrink(widths: &mut [usize], width: usize) {
    while total(widths) > width {
        match widths.iter_mut().max().filter(|widest| **widest > NARROW) {
            Some(widest) => *widest -= 1,
            None => return,
        }
    }
}

fn boxed(columns: &[Vec<String>], widths: &[usize]) -> String {
    let line: String = widths.iter().map(|width| format!("+{}", "-".repeat(width + 2))).collect();
    let line = format!("{line}+\n");
    let mut text = line.clone();
    for row in 0..columns.first().map_or(0, Vec::len) {
        for (column, width) in columns.iter().zip(widths) {
            let cell = cut(&column[row], *width);
            let pad = " ".repeat(width.saturating_sub(cell.width()));
            text.extend(["| ", &cell, &pad, " "]);
        }
        text.push_str("|\n");
        if row == 0 {
            text.push_str(&line);
        }
    }
    text.push_str(&line);
    text
}

/// Each row: what its first column says, and the others below it.
fn paragraphs(columns: &[Vec<String>]) -> String {
    let mut text = String::new();
    for row in 1..columns.first().map_or(0, Vec::len) {
        for column in columns {
            text.push_str(column[row].trim_end());
            text.push('\n');
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use arrow::array::{ArrayRef, Int64Array, RecordBatch, StringArray};

    use super::*;

    fn answer(columns: usize, text: &str) -> Answer {
        let column = |at: usize| -> (String, ArrayRef) {
            match at {
                0 => ("id".to_owned(), Arc::new(Int64Array::from(vec![7]))),
                _ => (format!("column_{at}"), Arc::new(StringArray::from(vec![text]))),
            }
        };
        let batch = RecordBatch::try_from_iter((0..columns).map(column)).unwrap();
        Answer { schema: batch.schema(), batches: vec![batch] }
    }

    #[test]
    fn a_table_is_cut_to_the_terminal() {
        let fits = of(&answer(2, "abc"), 80).unwrap();
        assert_eq!(
            fits.text,
            String::from_utf8(output::encoded(&answer(2, "abc"), Format::Table).unwrap()).unwrap()
        );
        let cut = of(&answer(2, "日本語 and a long text"), 22).unwrap();
        let lines: Vec<&str> = cut.text.lines().collect();
        assert_eq!(
            lines[1..4],
            ["| id | column_1      |", "+----+---------------+", "| 7  | 日本語 and a… |"]
        );
        let many = of(&answer(12, "a long text"), 60).unwrap();
        assert!(many.text.lines().all(|line| line.width() <= 60), "{}", many.text);
        assert_eq!(
            many.text.lines().nth(1),
            Some("| id | column_1   | column_2   | … | column_10 | column_11 |")
        );
        let left_out: Vec<String> = (3..10).map(|at| format!("column_{at}")).collect();
        assert_eq!(many.left_out, left_out);
        let plan = of(&answer(2, "Filter: x\n  Scan: t"), 16).unwrap();
        assert_eq!(plan.text, "7\nFilter: x\n  Scan: t\n");
        let empty = Answer { schema: answer(3, "").schema, batches: Vec::new() };
        assert_eq!(of(&empty, 20).unwrap().text.lines().count(), 4);
        for width in 0..60 {
            of(&answer(5, "text"), width).unwrap();
        }
    }
}
