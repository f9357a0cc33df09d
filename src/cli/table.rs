//! Text in columns for a terminal: lines of styled pieces, tables that give way when there is little room.

use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

/// Between two columns.
const GAP: usize = 2;
/// No column is made narrower than this.
const NARROW: usize = 6;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Style {
    #[default]
    Plain,
    Bold,
    Dim,
    Good,
    Bad,
}

impl Style {
    fn code(self) -> &'static str {
        match self {
            Self::Plain => "",
            Self::Bold => "\x1b[1m",
            Self::Dim => "\x1b[2m",
            Self::Good => "\x1b[32m",
            Self::Bad => "\x1b[33m",
        }
    }
}

/// One line of the screen.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Line(Vec<(Style, String)>);

impl Line {
    pub fn new(style: Style, text: impl Into<String>) -> Self {
        Self(vec![(style, text.into())])
    }

    #[must_use]
    pub fn and(mut self, style: Style, text: impl Into<String>) -> Self {
        self.0.push((style, text.into()));
        self
    }

    pub fn width(&self) -> usize {
        self.0.iter().map(|(_, text)| text.width()).sum()
    }

    /// The text, cut to `width` columns; with its styles if `styled`.
    pub fn paint(&self, width: usize, styled: bool) -> String {
        let mut painted = String::new();
        let mut room = width;
        for (style, text) in &self.0 {
            let text = cut(text, room);
            room -= text.width();
            match style.code() {
                code if styled && !code.is_empty() => painted.extend([code, text.as_str(), "\x1b[0m"]),
                _ => painted.push_str(&text),
            }
        }
        painted.truncate(painted.trim_end_matches(' ').len());
        painted
    }
}

/// At most `width` columns of a text, control characters left out; `…` stands for what was cut off.
pub fn cut(text: &str, width: usize) -> String {
    let clean: String = text.chars().filter(|c| !c.is_control()).collect();
    if clean.width() <= width {
        return clean;
    }
    let mut kept = String::new();
    let mut used = 1;
    for c in clean.chars() {
        used += c.width().unwrap_or(0);
        if used > width {
            break;
        }
        kept.push(c);
    }
    if width > 0 {
        kept.push('…');
    }
    kept
}

/// A column of a table.
#[derive(Debug, Clone, Default)]
pub struct Column {
    pub head: String,
    /// Numbers stand at the right.
    pub right: bool,
    /// When there is no room, columns with the greatest rank go first; those of rank 0 never.
    pub rank: u8,
    /// Its head is shown whole, or the column goes.
    pub whole: bool,
    pub cells: Vec<(Style, String)>,
}

impl Column {
    pub fn new(head: impl Into<String>, right: bool, rank: u8, cells: Vec<(Style, String)>) -> Self {
        Self { head: head.into(), right, rank, whole: true, cells }
    }

    /// Its head may be cut.
    #[must_use]
    pub fn cut_head(self) -> Self {
        Self { whole: false, ..self }
    }

    /// What it needs at least before cells are cut.
    fn least(&self) -> usize {
        let head = self.head.width();
        self.needs().max(if self.whole { head } else { head.min(NARROW) })
    }

    /// What its cells need, without the head.
    fn needs(&self) -> usize {
        self.cells.iter().map(|(_, cell)| cell.width()).max().unwrap_or(0)
    }
}

/// Head and rows of a table that fits into `width`: first columns of low rank go, then heads are cut, then cells.
pub fn table(mut columns: Vec<Column>, width: usize) -> Vec<Line> {
    let total = |columns: &[Column], of: &dyn Fn(&Column) -> usize| {
        columns.iter().map(of).sum::<usize>() + GAP * columns.len().saturating_sub(1)
    };
    while total(&columns, &Column::least) > width {
        let rank = columns.iter().map(|column| column.rank).max().unwrap_or(0);
        let Some(last) = columns.iter().rposition(|column| column.rank == rank && rank > 0) else { break };
        columns.remove(last);
    }
    let mut widths: Vec<usize> =
        columns.iter().map(|column| column.needs().max(column.head.width())).collect();
    let room = width.saturating_sub(GAP * columns.len().saturating_sub(1));
    for floor in [Floor::Cells, Floor::Narrow] {
        shrink(&mut widths, &columns, room, &floor);
    }
    let line = |cell: &dyn Fn(&Column) -> (Style, String)| {
        let mut line = Line::default();
        for (at, (column, width)) in columns.iter().zip(&widths).enumerate() {
            let (style, text) = cell(column);
            let text = cut(&text, *width);
            let pad = " ".repeat(width - text.width());
            let gap = " ".repeat(if at == 0 { 0 } else { GAP });
            let text = if column.right { format!("{gap}{pad}{text}") } else { format!("{gap}{text}{pad}") };
            line = line.and(style, text);
        }
        line
    };
    let rows = columns.iter().map(|column| column.cells.len()).max().unwrap_or(0);
    let mut lines = vec![line(&|column| (Style::Dim, column.head.clone()))];
    lines.extend((0..rows).map(|row| line(&|column| column.cells.get(row).cloned().unwrap_or_default())));
    lines
}

enum Floor {
    /// Only heads are cut.
    Cells,
    Narrow,
}

/// Takes from the column that has the most to spare, until the table fits or none has any.
fn shrink(widths: &mut [usize], columns: &[Column], room: usize, floor: &Floor) {
    let spare = |at: usize, width: usize| {
        let least = match floor {
            Floor::Cells => columns[at].least(),
            Floor::Narrow => NARROW,
        };
        width.saturating_sub(least)
    };
    while widths.iter().sum::<usize>() > room {
        let most = (0..widths.len()).max_by_key(|at| spare(*at, widths[*at]));
        match most.filter(|at| spare(*at, widths[*at]) > 0) {
            Some(at) => widths[at] -= 1,
            None => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(lines: &[Line], width: usize) -> Vec<String> {
        lines.iter().map(|line| line.paint(width, false)).collect()
    }

    fn columns() -> Vec<Column> {
        let cell = |text: &str| (Style::Plain, text.to_owned());
        vec![
            Column::new("name", false, 0, vec![cell("transactions"), cell("tx")]),
            Column::new("a_long_head", true, 0, vec![cell("7"), cell("1,234")]).cut_head(),
            Column::new("extra", false, 1, vec![cell("something"), cell("-")]),
        ]
    }

    #[test]
    fn columns_go_then_heads_are_cut_then_cells() {
        let wide = texts(&table(columns(), 80), 80);
        assert_eq!(
            wide,
            [
                "name          a_long_head  extra",
                "transactions            7  something",
                "tx                  1,234  -"
            ]
        );
        let heads = texts(&table(columns(), 32), 32);
        assert_eq!(heads[0], "name          a_long…  extra");
        let fewer = texts(&table(columns(), 24), 24);
        assert_eq!(
            fewer,
            ["name          a_long_he…", "transactions           7", "tx                 1,234"]
        );
        let narrow = texts(&table(columns(), 16), 16);
        assert_eq!(narrow[1], "transac…       7");
        for width in 0..40 {
            assert!(table(columns(), width).iter().all(|line| line.paint(width, false).width() <= width));
        }
    }

    #[test]
    fn wide_letters_and_control_characters_do_not_tear_a_line() {
        assert_eq!(cut("日本語テキスト", 7), "日本語…");
        assert_eq!(cut("a\x1b[31m\nb", 10), "a[31mb");
        assert_eq!(
            Line::new(Style::Bold, "ab").and(Style::Dim, "cd").paint(3, true),
            "\x1b[1mab\x1b[0m\x1b[2m…\x1b[0m"
        );
    }
}
