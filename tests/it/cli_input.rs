//! Comments and labels as other programs write them: `score`, `eval` and `retrain`, run as processes on such files.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::common::fixture;
use crate::common::process::Start;

/// A word in files that must not appear in any message.
const MARK: &str = "zebramarkword";

fn command(name: &str, folder: &Path) -> Command {
    let mut command = crate::common::without_settings(env!("CARGO_BIN_EXE_moderatord"));
    command.args([name, "--model"]).arg(fixture("gemma3"));
    if name == "retrain" {
        let registry = format!("file://{}/registry", folder.display());
        command.env("MODERATORD__REGISTRY__URL", registry);
    }
    command
}

struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    /// Runs a command on a file. Returns its exit code, stdout and stderr.
    fn run(&self, name: &str, path: &Path) -> (Option<i32>, String, String) {
        let Output { status, stdout, stderr } = command(name, self.0.path()).arg("--input").arg(path).finish().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        let stderr = text(stderr).replace(&format!("{}/", self.0.path().display()), "");
        (status.code(), text(stdout), stderr)
    }

    /// Scores a file, all of which can be read.
    fn score(&self, name: &str, content: impl AsRef<[u8]>) -> Vec<Value> {
        let (code, out, err) = self.run("score", &self.write(name, content));
        assert_eq!((code, err.as_str()), (Some(0), ""), "{name}");
        out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

fn gzip(content: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

fn without_time(mut decisions: Vec<Value>) -> Vec<Value> {
    for decision in &mut decisions {
        decision["scored_at"] = Value::Null;
    }
    decisions
}

fn sha256(text: &str) -> String {
    Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn half_an_emoji_is_scored_and_the_decision_says_so() {
    let files = Files::new();
    let decisions = files.score(
        "in.jsonl",
        "{\"content_id\":\"1\",\"text\":\"have a nice day \\ud83d\"}\n\
         {\"content_id\":\"2\",\"text\":\"have \\udc00 a nice day\"}\n\
         {\"content_id\":\"3\",\"text\":\"have a nice day \\ud83c\\udf31\"}\n",
    );
    let texts = [
        "have a nice day \u{fffd}",
        "have \u{fffd} a nice day",
        "have a nice day \u{1f331}",
    ];
    assert_eq!(decisions.len(), 3);
    for (decision, (text, replaced)) in decisions.iter().zip(texts.iter().zip([Some(1), Some(1), None])) {
        assert_eq!(decision["text_sha256"], sha256(text));
        assert_eq!(decision.get("replaced_surrogates").and_then(Value::as_u64), replaced);
    }
}

#[test]
fn a_byte_order_mark_and_an_id_of_any_size_are_read() {
    let files = Files::new();
    let decisions = files.score(
        "in.jsonl",
        "\u{feff}{\"content_id\":12345678901234567890123,\"text\":\"have a nice day\"}\n\
         {\"content_id\":\"2\",\"text\":\"have a nice day\"}\n",
    );
    let ids: Vec<_> = decisions
        .iter()
        .map(|decision| decision["content_id"].as_str())
        .collect();
    assert_eq!(ids, [Some("12345678901234567890123"), Some("2")]);
}

#[test]
fn lines_a_table_and_gzip_of_them_give_the_same_decisions() {
    let files = Files::new();
    let lines = concat!(
        r#"{"content_id":"007","community_id":"gardening","text":"see you, \"later\"\nat the garden"}"#,
        "\n",
        r#"{"content_id":"c2","op":"delete"}"#,
        "\n",
        r#"{"content_id":"c3","revision":4,"op":"edit","text":"caf\u00e9"}"#,
        "\n",
    );
    let rows = "content_id,Revision,op,community_id,text\r\n\
                007,,,gardening,\"see you, \"\"later\"\"\nat the garden\"\r\nc2,,delete,,\r\nc3,4,edit,,caf\u{e9}\r\n";
    let expected = without_time(files.score("in.jsonl", lines));
    assert_eq!(expected.len(), 3);
    let mut two_members = gzip(&lines.as_bytes()[..40]);
    two_members.extend(gzip(&lines.as_bytes()[40..]));
    let semicolons = rows
        .replace("see you,", "see you")
        .replace(',', ";")
        .replace("see you", "see you,");
    for (name, content) in [
        ("in.jsonl.gz", gzip(lines.as_bytes())),
        ("two-members", two_members),
        ("in.csv", rows.into()),
        ("with-mark.csv", format!("\u{feff}{rows}").into()),
        ("no-extension", rows.into()),
        ("in.csv.gz", gzip(rows.as_bytes())),
        ("semicolons.csv", semicolons.into()),
        (
            "in.tsv",
            rows.replace("see you,", "see you")
                .replace(',', "\t")
                .replace("see you", "see you,")
                .into(),
        ),
    ] {
        assert_eq!(without_time(files.score(name, content)), expected, "{name}");
    }
}

#[test]
fn columns_that_are_not_read_are_named_and_a_missing_one_is_a_failure() {
    let files = Files::new();
    let path = files.write(
        "in.csv",
        format!("id,text,Note\n1,have a nice day,{MARK}\n2,too few\n3,\u{e9},x\n"),
    );
    let (code, out, err) = files.run("score", &path);
    assert_eq!((code, out.lines().count()), (Some(1), 2), "{err}");
    assert_eq!(
        err,
        "`in.csv`: reads the columns `text`, and ignores `id`, `Note`\n\
         line 3: the row has 2 columns, expected 3\n\
         moderatord: 1 line could not be scored\n"
    );
    let check = |name: &str, content: &[u8], expected: &str| {
        let (code, out, err) = files.run(name, &files.write("in.csv", content));
        assert_eq!((code, out.as_str(), err.as_str()), (Some(1), "", expected));
    };
    check(
        "score",
        b"content_id,body\n1,have a nice day\n",
        "moderatord: cannot read `in.csv`: it is CSV without the column `text`; its columns are `content_id`, `body`\n",
    );
    check(
        "eval",
        b"content_id,text\n1,have a nice day\n",
        "moderatord: cannot read `in.csv`: it is CSV without the column `label`; its columns are `content_id`, `text`\n",
    );
    check(
        "score",
        b"text,content_id,text\na,b,c\n",
        "moderatord: cannot read `in.csv`: it is CSV with two columns `text`\n",
    );
    // The first row is a comment, and is not shown.
    check(
        "score",
        format!("{MARK},ok\nhave a nice day,ok\n").as_bytes(),
        "moderatord: cannot read `in.csv`: it is CSV without the column `text`; its first line must name the columns, and \
         names none of the 6 that are known\n",
    );
    // Latin-1, as spreadsheets save it.
    let (_, _, err) = files.run("score", &files.write("in.csv", b"text,op\ncaf\xe9,\n"));
    assert!(
        err.starts_with("line 2: column `text` is not valid UTF-8; save the file as UTF-8\n"),
        "{err}"
    );
}

#[test]
fn a_column_may_have_the_name_of_the_setting() {
    let files = Files::new();
    let path = files.write("in.csv", "id,body,kind\n1,have a nice day,c\n2,,d\n");
    let config = files.write(
        "m.toml",
        "[input]\ncontent_id = [\"/after/id\", \"/id\"]\ntext = \"/body\"\nop = \"/kind\"\n[input.ops]\nc = \"create\"\nd = \"delete\"\n",
    );
    let mut command = command("score", files.0.path());
    let output = command
        .arg("--config")
        .arg(config)
        .arg("--input")
        .arg(path)
        .finish()
        .unwrap();
    assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(0), &b""[..]));
    let out = String::from_utf8(output.stdout).unwrap();
    let decisions: Vec<Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(decisions[0]["content_id"], "1");
    assert_eq!(decisions[0]["text_sha256"], sha256("have a nice day"));
    assert_eq!(
        (&decisions[1]["content_id"], &decisions[1]["action"]),
        (&"2".into(), &"delete".into())
    );
}

#[test]
fn a_file_of_which_nothing_can_be_read_is_a_failure_that_says_what_it_looks_like() {
    let files = Files::new();
    let utf16: Vec<u8> = "{\"text\":\"a\"}\n".encode_utf16().flat_map(u16::to_le_bytes).collect();
    let marked = [&b"\xff\xfe"[..], &utf16].concat();
    let mut truncated = gzip(&b"{\"text\":\"have a nice day\",\"label\":\"ok\"}\n".repeat(100));
    truncated.truncate(40);
    let array = format!("[{{\"text\":\"{MARK}\"}}]\n");
    let broken = format!("{{\n  \"text\": \"{MARK}\"\n}}\n");
    let cases: [(&[u8], &str); 10] = [
        (b"PAR1\x15\x04", "it is a Parquet file"),
        (b"PK\x03\x04\x14", "it is a ZIP archive or an Excel workbook"),
        (b"\x28\xb5\x2f\xfd\x04", "it is compressed with zstd"),
        (&marked, "it is text in UTF-16; convert it with `iconv"),
        (&utf16, "it looks like text in UTF-16 without a byte order mark"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "it is a pointer of Git LFS",
        ),
        (&truncated, "cannot read `labels`: incomplete deflate stream"),
        (array.as_bytes(), "which has 1 line: it looks like a JSON array"),
        (
            broken.as_bytes(),
            "which has 3 lines: it looks like a JSON object on several lines",
        ),
        (
            MARK.as_bytes(),
            "which has 1 line: expected JSON lines, CSV with a header, or gzip of either",
        ),
    ];
    for (content, expected) in cases {
        let path = files.write("labels", content);
        for name in ["score", "eval", "retrain"] {
            let (code, _, err) = files.run(name, &path);
            assert_eq!(code, Some(1), "{name} {expected}: {err}");
            let last = err.lines().last().unwrap();
            assert!(
                last.starts_with("moderatord: ") && last.contains(expected),
                "{name}: {err}"
            );
            assert!(!err.contains(MARK), "{name}: {err}");
        }
    }
}

/// The rows after a quote that never ends would otherwise become a part of one comment.
#[test]
fn a_quote_that_never_ends_is_named() {
    let files = Files::new();
    let rows = "content_id,text\n1,a fine day\n2,\"so nice\n3,see you\n";
    for rows in [rows.to_owned(), rows.trim_end().to_owned(), format!("{rows}\n\n")] {
        let (code, out, err) = files.run("score", &files.write("in.csv", rows));
        assert_eq!(code, Some(1), "{out}");
        assert!(
            out.contains("\"content_id\":\"1\"") && out.lines().count() == 1,
            "{out}"
        );
        assert!(err.contains("line 3: a quote that begins here"), "{err}");
    }
    // A quote that ends, or that does not begin a cell, is no fault.
    let rows = "content_id,text\n1,a 5\" nail\n2,\"so nice\"\n";
    let (code, out, err) = files.run("score", &files.write("in.csv", rows));
    assert_eq!((code, out.lines().count()), (Some(0), 2), "{err}");
}

#[test]
fn labels_are_read_from_a_table() {
    let files = Files::new();
    let rows: String = (0..150)
        .map(|row| {
            format!(
                "{row},have a nice day {row},{}\n",
                if row % 2 == 0 { "ok" } else { "0.75" }
            )
        })
        .collect();
    let path = files.write("labels.csv", format!("id,text,label\n{rows}"));
    let (code, out, err) = files.run("eval", &path);
    assert_eq!(
        (code, err.as_str()),
        (
            Some(0),
            "`labels.csv`: reads the columns `text`, `label`, and ignores `id`\n"
        )
    );
    assert!(out.contains("rows      150, 75 hateful"), "{out}");
    // Few rows, so that nothing is trained.
    let few: String = rows.lines().take(3).flat_map(|row| [row, "\n"]).collect();
    let table = format!(
        "content_id,text,label,weight,sample.rate,source\n{}",
        few.replace('\n', ",2,0.5,user\n")
    );
    let path = files.write("labels.csv.gz", gzip(table.as_bytes()));
    let (code, out, err) = files.run("retrain", &path);
    assert_eq!((code, err.as_str()), (Some(0), ""), "{out}");
    assert!(
        out.starts_with("feedback  3 records, 3 content ids, 0 superseded, 0 forgotten, 0 refused\nskipped: "),
        "{out}"
    );
}

#[test]
fn retrain_fails_if_every_label_is_refused_and_reads_what_other_programs_write() {
    let files = Files::new();
    let path = files.write("labels.jsonl", "have a nice day\tok\n".repeat(150));
    let (code, out, err) = files.run("retrain", &path);
    assert_eq!(code, Some(1), "{out}");
    assert!(
        out.starts_with("feedback  150 records, 0 content ids, 0 superseded, 0 forgotten, 150 refused"),
        "{out}"
    );
    assert!(!out.contains("skipped"), "{out}");
    assert!(
        err.ends_with(
            "moderatord: nothing could be read from `labels.jsonl`, which has 150 lines: it looks like CSV without the names \
             of the columns; its first line must name them, such as `text` and `label`\n"
        ),
        "{err}"
    );
    // No labels at all are no failure: there may be none yet.
    let (code, out, _) = files.run("retrain", &files.write("labels.jsonl", ""));
    assert_eq!(code, Some(0), "{out}");
    let labels = "\u{feff}{\"text\":\"a nice day \\ud83d\",\"label\":\"ok\"}\n{\"text\":\"a fine day\",\"label\":1}\n";
    let path = files.write("labels.jsonl", labels);
    let (code, out, _) = files.run("retrain", &path);
    assert_eq!(code, Some(0), "{out}");
    assert!(
        out.contains(
            "2 content ids, 0 superseded, 0 forgotten, 0 refused\n\
                      repaired  1 record with half of a surrogate pair in the text, read as U+FFFD\n"
        ),
        "{out}"
    );
    let (code, out, err) = files.run("eval", &path);
    assert_eq!(code, Some(0), "{out}");
    assert_eq!(
        err,
        "1 record with half of a surrogate pair in the text, read as U+FFFD\n"
    );
}

#[test]
fn markup_is_decoded_for_the_model_and_hashes_are_of_the_text_as_received() {
    let files = Files::new();
    let score = |markup: &str, text: &str| -> Value {
        let mut command = command("score", files.0.path());
        command.env("MODERATORD__INPUT__MARKUP", markup).args(["--text", text]);
        let output = command.finish().unwrap();
        assert_eq!(output.status.code(), Some(0), "{markup}");
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let seen = score("none", "see you\nat the garden");
    assert_eq!(seen["model"]["normalizer"], "fold-2");
    let html = "<p>s&#101;e <b>yo</b>u</p><p>at the&#x20;garden</p>";
    let markdown = "s&#101;e **yo**u\n\nat the `garden`";
    for (markup, text) in [("html", html), ("markdown", markdown)] {
        let decision = score(markup, text);
        assert_eq!(decision["margin"], seen["margin"], "{markup}");
        assert_ne!(decision["margin"], score("none", text)["margin"], "{markup}");
        assert_eq!(decision["model"]["normalizer"], format!("{markup}-1+fold-2"));
        assert_eq!(decision["text_sha256"], sha256(text));
        // The decision says how its text is decoded, whatever the settings are now.
        let path = files.write("decision.json", decision.to_string());
        let mut explain = command("explain", files.0.path());
        let output = explain
            .arg("--decision")
            .arg(path)
            .args(["--text", text])
            .finish()
            .unwrap();
        let out = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success() && out.contains("equal: "), "{out}");
    }
    // Labelled texts are decoded in the same way.
    let evaluate = |markup: &str, text: &str| {
        let rows = serde_json::json!({ "text": text, "label": "ok" }).to_string() + "\n{\"text\":\"go\",\"label\":1}\n";
        let path = files.write("labels.jsonl", rows);
        let mut command = command("eval", files.0.path());
        command
            .env("MODERATORD__INPUT__MARKUP", markup)
            .arg("--json")
            .arg("--input")
            .arg(path);
        String::from_utf8(command.finish().unwrap().stdout).unwrap()
    };
    let expected = evaluate("none", "see you\nat the garden");
    assert!(expected.contains("figures"), "{expected}");
    assert_eq!(evaluate("html", html), expected);
}

#[test]
fn a_decision_is_explained_with_the_rules_that_it_names() {
    let files = Files::new();
    let text = "s\u{435}e y\u{43e}u at the g\u{430}rden";
    let score = |rules: &str, text: &str| -> Value {
        let mut command = command("score", files.0.path());
        command
            .env("MODERATORD__PROMPT__NORMALIZE", rules)
            .args(["--text", text]);
        serde_json::from_slice(&command.finish().unwrap().stdout).unwrap()
    };
    let plain = score("full", "see you at the garden");
    for (rules, name) in [
        ("full", "fold-2"),
        ("true", "fold-2"),
        ("nfc", "nfc-1"),
        ("false", "none"),
    ] {
        let decision = score(rules, text);
        assert_eq!(decision["model"]["normalizer"], name);
        assert_eq!(decision["margin"] == plain["margin"], name == "fold-2", "{rules}");
        assert_eq!(decision["text_sha256"], sha256(text));
        let path = files.write("decision.json", decision.to_string());
        let mut explain = command("explain", files.0.path());
        let output = explain
            .arg("--decision")
            .arg(path)
            .args(["--text", text])
            .finish()
            .unwrap();
        let out = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success() && out.contains("equal: "), "{rules}: {out}");
    }
}
