//! Columns that `SELECT *` leaves out: a source's metadata, a table's partition columns (DESIGN §2).
//!
//! They stay usable by name. Wildcards of every SELECT get an EXCLUDE for the relations in its own FROM; a common
//! table expression of the same name hides nothing.

use std::ops::ControlFlow;

use sqlparser::ast::{
    ExcludeSelectItem, Ident, ObjectName, Query, Select, SelectItem, SelectItemQualifiedWildcardKind,
    TableFactor, VisitMut, VisitorMut, WildcardAdditionalOptions,
};

use crate::sql::parser::normal;

/// `hidden`: the columns of a relation that wildcards leave out.
pub fn hide(node: &mut impl VisitMut, hidden: &dyn Fn(&str) -> Vec<String>) {
    let mut visitor = Hide { hidden, scopes: Vec::new() };
    // Never breaks.
    let _: ControlFlow<()> = node.visit(&mut visitor);
}

struct Hide<'a> {
    hidden: &'a dyn Fn(&str) -> Vec<String>,
    /// Names of the common table expressions of the queries around.
    scopes: Vec<Vec<String>>,
}

impl VisitorMut for Hide<'_> {
    type Break = ();

    fn pre_visit_query(&mut self, query: &mut Query) -> ControlFlow<()> {
        let named = query.with.iter().flat_map(|with| &with.cte_tables);
        self.scopes.push(named.map(|table| normal(&table.alias.name)).collect());
        ControlFlow::Continue(())
    }

    fn post_visit_query(&mut self, _query: &mut Query) -> ControlFlow<()> {
        self.scopes.pop();
        ControlFlow::Continue(())
    }

    fn pre_visit_select(&mut self, select: &mut Select) -> ControlFlow<()> {
        let factors = select.from.iter().flat_map(|from| {
            std::iter::once(&from.relation).chain(from.joins.iter().map(|join| &join.relation))
        });
        let relations: Vec<(String, Vec<String>)> =
            factors.filter_map(|factor| self.relation(factor)).collect();
        for item in &mut select.projection {
            match item {
                SelectItem::Wildcard(options) => {
                    relations.iter().for_each(|(_, columns)| exclude(options, columns));
                }
                SelectItem::QualifiedWildcard(SelectItemQualifiedWildcardKind::ObjectName(name), options) => {
                    let of = last(name);
                    let own = relations.iter().filter(|(known, _)| Some(known) == of.as_ref());
                    own.for_each(|(_, columns)| exclude(options, columns));
                }
                _ => {}
            }
        }
        ControlFlow::Continue(())
    }
}

impl Hide<'_> {
    /// What a table of a FROM is called, and its hidden columns; `None` when it has none.
    fn relation(&self, factor: &TableFactor) -> Option<(String, Vec<String>)> {
        let TableFactor::Table { name, alias, args: None, .. } = factor else { return None };
        let table = last(name)?;
        if name.0.len() == 1 && self.scopes.iter().any(|names| names.contains(&table)) {
            return None;
        }
        let columns = (self.hidden)(&table);
        let called = alias.as_ref().map_or(table, |alias| normal(&alias.name));
        (!columns.is_empty()).then_some((called, columns))
    }
}

fn last(name: &ObjectName) -> Option<String> {
    name.0.last()?.as_ident().map(normal)
}

/// Adds columns to what a wildcard leaves out already.
fn exclude(options: &mut WildcardAdditionalOptions, columns: &[String]) {
    let mut all = match options.opt_exclude.take() {
        None => Vec::new(),
        Some(ExcludeSelectItem::Single(name)) => vec![name],
        Some(ExcludeSelectItem::Multiple(names)) => names,
    };
    let except = options.opt_except.iter().flat_map(|except| {
        std::iter::once(&except.first_element).chain(&except.additional_elements).map(normal)
    });
    let mut known: Vec<String> = all.iter().filter_map(last).chain(except).collect();
    for column in columns {
        if !known.contains(column) {
            known.push(column.clone());
            all.push(ObjectName::from(vec![Ident::with_quote('"', column)]));
        }
    }
    options.opt_exclude = (!all.is_empty()).then_some(ExcludeSelectItem::Multiple(all));
}

#[cfg(test)]
mod tests {
    use sqlparser::dialect::GenericDialect;
    use sqlparser::parser::Parser;

    use super::*;

    fn rewritten(sql: &str) -> String {
        let mut statements = Parser::parse_sql(&GenericDialect {}, sql).unwrap();
        hide(&mut statements[0], &|table| match table {
            "t" => vec!["_a".to_owned(), "_b".to_owned()],
            _ => Vec::new(),
        });
        statements[0].to_string()
    }

    #[test]
    fn wildcards_leave_hidden_columns_out() {
        for (sql, expected) in [
            ("SELECT * FROM t", "SELECT * EXCLUDE (\"_a\", \"_b\") FROM t"),
            ("SELECT x.*, _a FROM t AS x", "SELECT x.* EXCLUDE (\"_a\", \"_b\"), _a FROM t AS x"),
            (
                "SELECT * EXCLUDE (c, _a) FROM T JOIN u ON true",
                "SELECT * EXCLUDE (c, _a, \"_b\") FROM T JOIN u ON true",
            ),
            (
                "SELECT * FROM (SELECT * FROM t) AS s",
                "SELECT * FROM (SELECT * EXCLUDE (\"_a\", \"_b\") FROM t) AS s",
            ),
            ("WITH t AS (SELECT 1 AS n) SELECT * FROM t", "WITH t AS (SELECT 1 AS n) SELECT * FROM t"),
            ("SELECT u.*, count(*) FROM u, t", "SELECT u.*, count(*) FROM u, t"),
            ("SELECT _a FROM \"T\"", "SELECT _a FROM \"T\""),
        ] {
            assert_eq!(rewritten(sql), expected);
        }
    }
}
