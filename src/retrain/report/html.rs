//! Small pieces of HTML. Whatever goes in as text comes out escaped.

use super::Fact;

/// A cell of a table.
pub(super) enum Cell {
    /// Text, to the left.
    Text(String),
    /// A number, to the right.
    Number(String),
    /// A number and a quieter remark under it.
    Remarked(String, String),
}

/// Text that may stand anywhere in HTML, in attributes too. Control characters are not allowed in HTML
/// and become the replacement character.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for char in text.chars() {
        match char {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            char if char.is_control() && !matches!(char, '\n' | '\t') => escaped.push('\u{fffd}'),
            char => escaped.push(char),
        }
    }
    escaped
}

/// Three decimals, or a dash where there is no number.
pub(super) fn number(value: Option<f64>) -> String {
    value.map_or_else(|| "–".to_owned(), |value| format!("{value:.3}"))
}

/// A share as per cent with one decimal, or a dash.
pub(super) fn percent(value: Option<f64>) -> String {
    value.map_or_else(|| "–".to_owned(), |value| format!("{:.1} %", 100.0 * value))
}

/// A table with a heading for each column and row; a row's first cell is its heading.
pub(super) fn table(caption: &str, columns: &[&str], rows: Vec<Vec<Cell>>) -> String {
    let numeric = |column: usize| {
        let mut cells = rows.iter().filter_map(|row| row.get(column));
        cells.any(|cell| !matches!(cell, Cell::Text(_)))
    };
    let headings = columns.iter().enumerate().map(|(column, name)| {
        let class = if numeric(column) { " class=\"number\"" } else { "" };
        format!("<th scope=\"col\"{class}>{}</th>", escape(name))
    });
    let headings = headings.collect::<String>();
    let body = rows.iter().map(|row| {
        let cells = row.iter().enumerate().map(|(column, cell)| match cell {
            Cell::Text(text) if column == 0 => format!("<th scope=\"row\">{}</th>", escape(text)),
            Cell::Text(text) => format!("<td>{}</td>", escape(text)),
            Cell::Number(text) => format!("<td class=\"number\">{}</td>", escape(text)),
            Cell::Remarked(text, remark) => format!(
                "<td class=\"number\">{}<br><small>{}</small></td>",
                escape(text),
                escape(remark)
            ),
        });
        format!("<tr>{}</tr>\n", cells.collect::<String>())
    });
    format!(
        "<div class=\"scroll\"><table>\n<caption>{}</caption>\n<thead><tr>{headings}</tr></thead>\n<tbody>\n{}</tbody>\n</table></div>\n",
        escape(caption),
        body.collect::<String>()
    )
}

/// A list of facts as a table of two columns.
pub(super) fn facts(caption: &str, facts: &[Fact]) -> String {
    let rows = facts.iter().map(|fact| {
        // Hashes are long and compared by eye.
        let class = if fact.value.contains("sha256:") {
            " class=\"hash\""
        } else {
            ""
        };
        format!(
            "<tr><th scope=\"row\">{}</th><td{class}>{}</td></tr>\n",
            escape(&fact.name),
            escape(&fact.value)
        )
    });
    format!(
        "<div class=\"scroll\"><table>\n<caption>{}</caption>\n<tbody>\n{}</tbody>\n</table></div>\n",
        escape(caption),
        rows.collect::<String>()
    )
}

/// A chart under its title, with a line of text below it.
pub(super) fn figure(title: &str, chart: &str, caption: &str) -> String {
    format!(
        "<figure><h3>{}</h3>\n{chart}\n<figcaption>{}</figcaption></figure>\n",
        escape(title),
        escape(caption)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_gets_out_of_its_place() {
        assert_eq!(
            escape("<b a='1' c=\"2\">&\u{0}\u{1b}</b>"),
            "&lt;b a=&#39;1&#39; c=&quot;2&quot;&gt;&amp;\u{fffd}\u{fffd}&lt;/b&gt;"
        );
        let evil = "</table><script>";
        let page = [
            table(evil, &[evil], vec![vec![Cell::Text(evil.into())]]),
            table(
                "",
                &["", ""],
                vec![vec![
                    Cell::Number(evil.into()),
                    Cell::Remarked(evil.into(), evil.into()),
                ]],
            ),
            facts(evil, &[Fact::new(evil, evil)]),
            figure(evil, "", evil),
        ];
        assert!(!page.concat().contains("<script"));
    }

    #[test]
    fn what_is_not_there_is_a_dash() {
        assert_eq!((number(None), number(Some(0.12345))), ("–".into(), "0.123".into()));
        assert_eq!((percent(None), percent(Some(0.1234))), ("–".into(), "12.3 %".into()));
    }
}
