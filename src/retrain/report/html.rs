//! The building blocks of the HTML page. They escape all text that they are given.

use super::Fact;

/// A cell of a table.
pub(super) enum Cell {
    /// Text, aligned to the left.
    Text(String),
    /// A number, aligned to the right.
    Number(String),
    /// A number, with a remark in smaller type below it.
    Remarked(String, String),
}

/// Escapes text for any place in HTML, including attributes. Control characters, which HTML does not allow, become
/// replacement characters.
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

/// Formats a number with three decimals, or as a dash if there is none.
pub(super) fn number(value: Option<f64>) -> String {
    value.map_or_else(|| "–".to_owned(), |value| format!("{value:.3}"))
}

/// Formats a share as a percentage with one decimal, or as a dash if there is none.
pub(super) fn percent(value: Option<f64>) -> String {
    value.map_or_else(|| "–".to_owned(), |value| format!("{:.1} %", 100.0 * value))
}

/// Renders a table with column headings. The first cell of each row is the heading of the row.
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

/// Renders facts as a table with two columns.
pub(super) fn facts(caption: &str, facts: &[Fact]) -> String {
    let rows = facts.iter().map(|fact| {
        // Hashes are set in a monospaced font, because they are long and compared by eye.
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

/// Renders a chart with a title above it and a caption below it.
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
    fn every_text_is_escaped() {
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
    fn missing_numbers_are_shown_as_dashes() {
        assert_eq!((number(None), number(Some(0.12345))), ("–".into(), "0.123".into()));
        assert_eq!((percent(None), percent(Some(0.1234))), ("–".into(), "12.3 %".into()));
    }
}
