//! Turns a comment in HTML or Markdown into the text that a reader sees.
//!
//! Only the copy that is scored is changed; hashes are of the text as received. Entities are decoded and tags are removed, so
//! that neither a word that is spelt with entities nor one with tags between its letters is hidden from the model. What a
//! reader may see is kept: the text of every element, the alternative text of images, and a tag that never ends.

use std::borrow::Cow;

use html5gum::emitters::default::DefaultEmitter;
use html5gum::{Error, Token, Tokenizer};
use pulldown_cmark::{Options, Parser};

use crate::config::Markup;

/// The version of the rules in this file. It must change whenever one of them does.
const VERSION: u32 = 1;

/// The elements that begin a line of their own, or end one.
const BLOCKS: [&[u8]; 34] = [
    b"address",
    b"article",
    b"aside",
    b"blockquote",
    b"br",
    b"dd",
    b"details",
    b"div",
    b"dl",
    b"dt",
    b"fieldset",
    b"figcaption",
    b"figure",
    b"footer",
    b"form",
    b"h1",
    b"h2",
    b"h3",
    b"h4",
    b"h5",
    b"h6",
    b"header",
    b"hr",
    b"li",
    b"main",
    b"nav",
    b"ol",
    b"p",
    b"pre",
    b"section",
    b"summary",
    b"table",
    b"tr",
    b"ul",
];

/// The elements between which there is at least a space.
const CELLS: [&[u8]; 2] = [b"td", b"th"];

impl Markup {
    /// Returns the name of the rules with their version, or `None` if there are none.
    pub(super) fn version(self) -> Option<String> {
        let name = match self {
            Self::None => return None,
            Self::Html => "html",
            Self::Markdown => "markdown",
        };
        Some(format!("{name}-{VERSION}"))
    }

    /// Returns the text that a reader sees.
    pub(super) fn decode(self, text: &str) -> Cow<'_, str> {
        match self {
            Self::None => Cow::Borrowed(text),
            Self::Html => decode_html(text),
            Self::Markdown => {
                let mut html = String::with_capacity(text.len());
                let options = Options::ENABLE_STRIKETHROUGH | Options::ENABLE_TABLES;
                pulldown_cmark::html::push_html(&mut html, Parser::new_ext(text, options));
                Cow::Owned(decode_html(&html).into_owned())
            }
        }
    }
}

fn decode_html(html: &str) -> Cow<'_, str> {
    if !html.contains(['<', '&']) {
        return Cow::Borrowed(html);
    }
    let mut text = SeenText::default();
    // The end of the last token that is complete, after which an unfinished one begins. The error about it may come first.
    let (mut end, mut is_unfinished) = (0, false);
    for token in Tokenizer::new_with_emitter(html, DefaultEmitter::<usize>::new_with_span()) {
        let Ok(token) = token;
        match token {
            Token::String(found) => {
                end = found.span.end;
                text.push(&String::from_utf8_lossy(&found.value));
            }
            Token::StartTag(tag) => {
                end = tag.span.end;
                text.separate(&tag.name);
                if tag.name.as_slice() == b"img"
                    && let Some(alternative) = tag.attributes.get(b"alt".as_slice())
                {
                    text.push(&String::from_utf8_lossy(&alternative.value));
                }
            }
            Token::EndTag(tag) => {
                end = tag.span.end;
                text.separate(&tag.name);
            }
            // One that never ends is reported before, unless it begins as no comment should, such as `<!a`.
            Token::Comment(comment) => {
                let shown = html.as_bytes().get(..comment.span.end);
                if !is_unfinished && shown.is_some_and(|shown| shown.ends_with(b">")) {
                    end = comment.span.end;
                } else {
                    is_unfinished = true;
                }
            }
            Token::Doctype(doctype) => end = doctype.span.end,
            Token::Error(error) => is_unfinished |= matches!(error.value, Error::EofInTag | Error::EofInComment),
        }
    }
    // Browsers show nothing of a tag or a comment that never ends, but other readers may.
    if is_unfinished {
        text.push(html.get(end..).unwrap_or_default());
    }
    Cow::Owned(text.text)
}

/// The text of a document, with a line for each block.
#[derive(Default)]
struct SeenText {
    text: String,
    separator: Option<char>,
}

impl SeenText {
    /// Adds text, after the separator of what precedes it.
    fn push(&mut self, text: &str) {
        let mut text = text;
        if let Some(separator) = self.separator {
            // White space at the edges of a block is not seen.
            text = text.trim_start();
            if text.is_empty() {
                return;
            }
            if !self.text.is_empty() && !self.text.ends_with(char::is_whitespace) {
                self.text.push(separator);
            }
            self.separator = None;
        }
        self.text.push_str(text);
    }

    /// Separates what follows a tag, if it is one of a block or a cell.
    fn separate(&mut self, tag: &[u8]) {
        if BLOCKS.contains(&tag) {
            self.separator = Some('\n');
            self.text.truncate(self.text.trim_end().len());
        } else if CELLS.contains(&tag) {
            self.separator = self.separator.or(Some(' '));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn entities_and_tags_of_html_are_decoded() {
        let check = |html: &str, expected: &str| assert_eq!(Markup::Html.decode(html), expected, "{html}");
        check("see you at the garden", "see you at the garden");
        check("&#115;ee &yacute;ou &amp; me", "see ýou & me");
        check("s<b>ee</b> y<i>o</i>u", "see you");
        check("s<!-- hidden -->ee", "see");
        check("<p>see you</p>\n<p>at the<br>garden</p>\n", "see you\nat the\ngarden");
        check("<table><tr><td>see</td><td>you</td></tr></table>", "see you");
        check(
            "<a href='https://example.org'>see</a> <img src=x alt='you &#128512;'>",
            "see you \u{1f600}",
        );
        // Entities are decoded once.
        check("&amp;lt;b&amp;gt;", "&lt;b&gt;");
        check("&lt;b&gt;see&lt;/b&gt;", "<b>see</b>");
        // What is not markup stays.
        check("I <3 you, 1 < 2 & 3 > 2", "I <3 you, 1 < 2 & 3 > 2");
        check("see &you; &#xd800;", "see &you; \u{fffd}");
        // Nothing that a reader may see is dropped.
        check("see you <garden gnome", "see you <garden gnome");
        check(
            "see <b>you</b> <a title=\"garden > gnome",
            "see you <a title=\"garden > gnome",
        );
        check(
            "s\u{e9}e \u{1f331} <b>you</b> <garden",
            "s\u{e9}e \u{1f331} you <garden",
        );
        check("see you <!-- later", "see you <!-- later");
        check("see <!-- you > --> <!-- later -- >", "see  <!-- later -- >");
        check("see <!you <?later", "see <!you <?later");
        check("<script>see you</script><style>garden</style>", "see yougarden");
    }

    #[test]
    fn markdown_is_read_as_it_is_rendered() {
        let check = |text: &str, expected: &str| assert_eq!(Markup::Markdown.decode(text), expected, "{text}");
        check("see you at the garden", "see you at the garden");
        check("s**e**e ~~you~~ _later_", "see you later");
        check("# see\n\n* you\n* [later](https://example.org)\n", "see\nyou\nlater");
        check("&#115;ee \\*you\\* `at` ![the](x)", "see *you* at the");
        check("s<b>e</b>e\n\n<div>\nyou\n</div>", "see\nyou");
        check("I <3 you, <garden gnome", "I <3 you, <garden gnome");
        check("a | b\n--|--\nsee | you", "a b\nsee you");
    }

    #[test]
    fn hostile_markup_takes_linear_time() {
        let start = Instant::now();
        for part in [
            "<", "&", "[", "*a ", "`", "![", "<!--", "&#", "> ", "<a ", "\\", "[a](", "|a", "~~",
        ] {
            let text = part.repeat(200_000 / part.len());
            for markup in [Markup::Html, Markup::Markdown] {
                let _ = markup.decode(&text);
            }
        }
        assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
    }

    proptest! {
        #[test]
        fn text_that_is_escaped_is_decoded_as_it_was(text in "[ a-z<>&;#'\"é😀]{0,40}") {
            let escaped = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
            prop_assert_eq!(Markup::Html.decode(&escaped), text);
        }

        #[test]
        fn any_text_is_decoded(text in any::<String>()) {
            for markup in [Markup::Html, Markup::Markdown] {
                let _ = markup.decode(&text);
            }
        }
    }
}
