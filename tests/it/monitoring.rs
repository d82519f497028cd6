//! The alerts, the dashboard and the operator's guide name only what the daemon exports, and explain all of it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use regex::Regex;
use serde_json::Value;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap()
}

/// A metric as the source declares and records it.
#[derive(Debug, Default)]
struct Metric {
    /// The comment on its constant, which lists the values of its labels.
    comment: String,
    labels: BTreeSet<String>,
    is_histogram: bool,
}

/// Returns all metrics of the source, by name.
fn exported() -> BTreeMap<String, Metric> {
    let declaration = Regex::new(r#"((?:///[^\n]*\n)+)pub const ([A-Z_]+): &str = "(\w+)";"#).unwrap();
    let declarations = read("src/ops/metrics.rs");
    let mut names = BTreeMap::new();
    let mut metrics: BTreeMap<String, Metric> = BTreeMap::new();
    for found in declaration.captures_iter(&declarations) {
        names.insert(found[2].to_owned(), found[3].to_owned());
        metrics.entry(found[3].to_owned()).or_default().comment = found[1].replace("///", "");
    }
    let record = Regex::new(
        r"(?s)\b(counter|gauge|histogram)!\(\s*(?:names::)?([A-Z_]+)(.*?)\)\s*(?:;|\.(?:set|increment|record)\()",
    )
    .unwrap();
    let label = Regex::new(r#""(\w+)" =>"#).unwrap();
    for source in sources(&root().join("src")) {
        let text = std::fs::read_to_string(source).unwrap();
        for found in record.captures_iter(&text) {
            let metric = metrics.get_mut(&names[&found[2]]).unwrap();
            metric.is_histogram |= &found[1] == "histogram";
            metric
                .labels
                .extend(label.captures_iter(&found[3]).map(|label| label[1].to_owned()));
        }
    }
    metrics
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found
}

/// Returns the metric of a series, whose name has a suffix if the metric is a histogram.
fn metric_of<'a>(exported: &'a BTreeMap<String, Metric>, series: &str) -> Option<&'a Metric> {
    exported.get(series).filter(|metric| !metric.is_histogram).or_else(|| {
        let suffixes = ["_bucket", "_sum", "_count"];
        let name = suffixes.iter().find_map(|suffix| series.strip_suffix(suffix))?;
        exported.get(name).filter(|metric| metric.is_histogram)
    })
}

/// Returns what is wrong with a query: a series, label or value of a label that the daemon does not export.
fn problems(exported: &BTreeMap<String, Metric>, query: &str) -> Vec<String> {
    // Labels that Prometheus adds, and that of the buckets of a histogram.
    let added = ["job", "instance", "le"];
    let mut problems = Vec::new();
    let selector = Regex::new(r"\b((?:moderatord|process)_\w+)(?:\{([^}]*)\})?").unwrap();
    let matcher = Regex::new(r#"(\w+)\s*(?:=~|!~|!=|=)\s*"([^"]*)""#).unwrap();
    let mut labels: BTreeSet<&str> = added.into();
    for found in selector.captures_iter(query) {
        let Some(metric) = metric_of(exported, &found[1]) else {
            problems.push(format!("{} is not exported", &found[1]));
            continue;
        };
        labels.extend(metric.labels.iter().map(String::as_str));
        for matched in matcher.captures_iter(found.get(2).map_or("", |labels| labels.as_str())) {
            let (label, values) = (&matched[1], &matched[2]);
            if added.contains(&label) {
                continue;
            }
            if !metric.labels.contains(label) {
                problems.push(format!("{} has no label `{label}`", &found[1]));
            }
            let words: Vec<&str> = metric
                .comment
                .split(|character: char| !character.is_alphanumeric() && character != '_')
                .collect();
            for value in values.split('|').filter(|value| !words.contains(value)) {
                problems.push(format!("{}: the label `{label}` is never `{value}`", &found[1]));
            }
        }
    }
    let grouping = Regex::new(r"\b(?:by|on|without|ignoring) \(([^)]*)\)").unwrap();
    for found in grouping.captures_iter(query) {
        let names = found[1].split(',').map(str::trim);
        for name in names.filter(|name| !labels.contains(name)) {
            problems.push(format!("no series has the label `{name}`"));
        }
    }
    problems
}

/// Returns the alerts with their queries.
fn alerts() -> Vec<(String, String)> {
    let rules = read("config/alerts.yml");
    let rule = Regex::new(r"(?s)- alert: (\w+)\n(.*?)\n        labels:").unwrap();
    let alerts: Vec<_> = rule
        .captures_iter(&rules)
        .map(|found| (found[1].to_owned(), found[2].to_owned()))
        .collect();
    assert_eq!(alerts.len(), rules.matches("- alert: ").count());
    alerts
}

#[test]
fn every_query_of_the_alerts_finds_what_is_exported() {
    let exported = exported();
    for (alert, query) in alerts() {
        assert_eq!(problems(&exported, &query), [""; 0], "{alert}");
    }
}

#[test]
fn every_query_of_the_dashboard_finds_what_is_exported() {
    let exported = exported();
    let dashboard: Value = serde_json::from_str(&read("config/dashboard.json")).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let ids: BTreeSet<_> = panels.iter().map(|panel| panel["id"].as_u64().unwrap()).collect();
    assert_eq!(ids.len(), panels.len());
    let mut queries = Vec::new();
    for panel in panels.iter().filter(|panel| panel["type"] != "row") {
        let targets = panel["targets"].as_array().unwrap();
        assert!(!targets.is_empty(), "{}", panel["title"]);
        queries.extend(targets.iter().map(|target| target["expr"].as_str().unwrap()));
    }
    for variable in dashboard["templating"]["list"].as_array().unwrap() {
        queries.extend(variable["query"]["query"].as_str());
    }
    // The variables of the dashboard stand for values of labels that Prometheus adds.
    for query in queries {
        assert_eq!(problems(&exported, query), [""; 0], "{query}");
    }
}

#[test]
fn a_query_for_something_else_is_noticed() {
    let exported = exported();
    for (query, expected) in [
        ("moderatord_readiness == 0", "moderatord_readiness is not exported"),
        (
            "rate(moderatord_stage_seconds[5m])",
            "moderatord_stage_seconds is not exported",
        ),
        (
            "sum(rate(moderatord_events_total{action=\"allow\"}[5m]))",
            "moderatord_events_total has no label `action`",
        ),
        (
            "moderatord_rebalances_total{kind=~\"lost|stolen\"} > 0",
            "moderatord_rebalances_total: the label `kind` is never `stolen`",
        ),
        (
            "sum by (job, partition) (moderatord_ready)",
            "no series has the label `partition`",
        ),
    ] {
        let problems = problems(&exported, query);
        assert!(
            problems.iter().any(|problem| problem == expected),
            "{query}: {problems:?}"
        );
    }
}

#[test]
fn the_guide_explains_every_metric_and_alert() {
    let guide = read("docs/operate.md");
    let exported = exported();
    for name in exported.keys() {
        assert!(guide.contains(&format!("`{name}`")), "{name}");
    }
    let series = Regex::new(r"`((?:moderatord|process)_\w+)(\{[^}]*\})?`").unwrap();
    for found in series.captures_iter(&guide) {
        let name = &found[1];
        assert!(exported.contains_key(name), "{name}");
        if found.get(2).is_some() {
            assert_eq!(problems(&exported, &found[0]), [""; 0]);
        }
    }
    let headings: BTreeSet<&str> = guide
        .lines()
        .filter_map(|line| line.strip_prefix("### Moderatord"))
        .collect();
    let rules = read("config/alerts.yml");
    for (alert, _) in alerts() {
        assert!(headings.contains(alert.strip_prefix("Moderatord").unwrap()), "{alert}");
        let runbook = format!("runbook: docs/operate.md#{}\n", alert.to_lowercase());
        assert!(rules.contains(&runbook), "{runbook}");
    }
    assert_eq!(headings.len(), alerts().len());
}

#[test]
fn the_guide_explains_every_error_that_ends_the_daemon() {
    let guide = read("docs/operate.md").replace('`', "");
    let error = Regex::new(r#"#\[error\(\s*"((?:[^"\\]|\\.|\\\n)*)""#).unwrap();
    let line_break = Regex::new(r"\\\n\s*").unwrap();
    let placeholder = Regex::new(r"\{[^}]*\}").unwrap();
    let mut count = 0;
    for source in ["src/stream/control.rs", "src/serving/mod.rs", "src/registry/error.rs"] {
        for found in error.captures_iter(&read(source)) {
            let text = line_break
                .replace_all(&found[1], "")
                .replace("\\\"", "\"")
                .replace('`', "");
            // The guide has dots in place of what varies. Single words are found anywhere, so they prove nothing.
            let literals = placeholder
                .split(&text)
                .map(|part| part.trim_matches([' ', ':', ';', '(', ')']));
            for literal in literals.filter(|part| part.contains(' ')) {
                assert!(guide.contains(literal), "{source}: `{literal}` of `{text}`");
                count += 1;
            }
        }
    }
    assert!(count >= 20, "{count}");
    for code in [0, 1, 64, 78] {
        assert!(guide.contains(&format!("\n| {code} | ")), "{code}");
    }
}
