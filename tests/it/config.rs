//! Settings: the shipped file and the defaults, the layers, and the faults, which are all reported at once.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::common::lines;
use moderatord::config::{
    Config, ConfigDraft, CrossFit, DEFAULT_THRESHOLDS, Delivery, DeviceChoice, InputFields, Normalize, NotInScope,
    OnGap, OnMissing, Quantize, Sources, Start, ThresholdSettings,
};
use moderatord::message::Op;

fn shipped() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("config/moderatord.toml")
}

/// Returns sources with a settings file of this text, and environment variables given without their prefix.
fn sources(file: &str, environment: &[(&str, &str)]) -> (tempfile::TempDir, Sources) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("moderatord.toml");
    std::fs::write(&path, file).unwrap();
    let variable = |&(name, value): &(&str, &str)| (format!("MODERATORD__{name}").into(), value.into());
    let sources = Sources {
        file: Some(path),
        environment: environment.iter().map(variable).collect(),
        flags: Vec::new(),
    };
    (folder, sources)
}

fn load(file: &str, environment: &[(&str, &str)]) -> Config {
    let (_folder, sources) = sources(file, environment);
    Config::load(&sources).unwrap()
}

/// Returns the faults, one per line, without the path of the temporary folder.
fn faults(file: &str, environment: &[(&str, &str)]) -> String {
    let (folder, sources) = sources(file, environment);
    let error = lines(&Config::load(&sources).unwrap_err());
    error.replace(&format!("{}/", folder.path().display()), "")
}

const MODEL: &str = "[model]\npath = \"/m\"\n";

/// Returns the settings if only those without a default are set.
fn minimal() -> Config {
    load(MODEL, &[])
}

#[test]
fn the_defaults_have_not_changed() {
    let config = minimal();
    assert_eq!(config.delivery, Delivery::ExactlyOnce);
    assert_eq!(
        (config.kafka.start, config.kafka.on_gap),
        (Start::Earliest, OnGap::Stop)
    );
    assert_eq!(config.kafka.group, "moderatord");
    let retrain = &config.retrain;
    assert_eq!((retrain.cross_fit, retrain.folds), (CrossFit::Auto, 5));
    assert!(retrain.provisional_thresholds && retrain.review_share.is_none());
    assert!(config.kafka.static_membership && config.kafka.brokers.is_empty());
    assert_eq!(
        (config.model.device, config.model.quantize),
        (DeviceChoice::Auto, Quantize::None)
    );
    assert_eq!(config.model.adapter, None);
    assert_eq!(config.input.fields, InputFields::default());
    assert_eq!(config.input.max_bytes, 1 << 20);
    assert_eq!((config.batch.max_tokens, config.batch.linger), (16_384, Duration::ZERO));
    assert_eq!(config.cache.entries, 65_536);
    assert_eq!(config.policy.thresholds, ThresholdSettings::default());
    assert_eq!(config.policy.not_in_scope, NotInScope::Review);
    let thresholds = config.policy.thresholds.or(DEFAULT_THRESHOLDS);
    assert_eq!((thresholds.review, thresholds.block), (0.5, 0.9));
    assert!(config.policy.communities.is_empty());
    assert_eq!(config.http.listen.to_string(), "127.0.0.1:9464");
    assert_eq!(config.shutdown.grace, Duration::from_secs(20));
}

#[test]
fn the_default_frame_is_exactly_the_published_one() {
    let prompt = minimal().prompt;
    let instructions = prompt.instructions.replace("{labels}", &prompt.labels.join(","));
    let separator = &prompt.separator;
    assert_eq!(
        format!("{instructions}{separator}Text:hello{separator}Prediction:"),
        "Classify the following text into one of the following classes:[Positive,Negative]<separator>Text:hello\
         <separator>Prediction:"
    );
    assert_eq!(prompt.hateful_label, "Negative");
    assert_eq!(
        (prompt.normalize, prompt.max_window_tokens, prompt.max_windows),
        (Normalize::Full, None, None)
    );
}

#[test]
fn the_shipped_file_contains_the_defaults() {
    let sources = Sources {
        file: Some(shipped()),
        environment: vec![("MODERATORD__MODEL__PATH".into(), "/m".into())],
        flags: Vec::new(),
    };
    let config = Config::load(&sources).unwrap();
    assert_eq!(format!("{config:?}"), format!("{:?}", minimal()));
}

#[test]
fn the_shipped_file_lists_and_explains_every_key() {
    let (_folder, sources) = sources(MODEL, &[]);
    let draft = ConfigDraft::read(&sources);
    let known: BTreeSet<&str> = draft.known_keys().collect();
    let text = std::fs::read_to_string(shipped()).unwrap();
    let (mut section, mut listed, mut explained) = (String::new(), BTreeSet::new(), false);
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('[') {
            section = format!("{}.", name.trim_end_matches(']'));
            listed.insert(name.trim_end_matches(']').to_owned());
        } else if let Some((name, _)) = line.trim_start_matches('#').split_once(" = ")
            && name.chars().all(|c| c.is_ascii_lowercase() || c == '_')
        {
            // The locations of the input fields share one comment, and so do the operations.
            assert!(
                explained || section.starts_with("input."),
                "{section}{name} has no comment above it"
            );
            listed.insert(format!("{section}{name}"));
            explained = false;
        }
        explained = line.starts_with("# ") || (explained && !line.is_empty());
    }
    let missing: Vec<_> = known.iter().filter(|key| !listed.contains(**key)).collect();
    assert!(missing.is_empty(), "not in the shipped file: {missing:?}");
}

#[test]
fn the_commented_examples_of_the_shipped_file_are_valid() {
    let text = std::fs::read_to_string(shipped()).unwrap();
    let is_example = |line: &&str| line.starts_with('#') && !line.starts_with("# ");
    assert!(
        text.lines().filter(is_example).count() >= 12,
        "examples begin with # without a space"
    );
    let active: String = text
        .lines()
        .map(|line| if is_example(&line) { &line[1..] } else { line })
        .flat_map(|line| [line, "\n"])
        .collect();
    let config = load(&active, &[("KAFKA__PASSWORD_FILE", ""), ("MODEL__ADAPTER", "")]);
    let stream = config.require_stream().unwrap();
    assert_eq!(stream.topics.decisions, "decisions");
    assert_eq!(stream.instance, "gpu0");
    assert_eq!(
        config.policy.communities["gardening"],
        ThresholdSettings {
            review: Some(0.3),
            block: Some(0.8)
        }
    );
}

#[test]
fn later_layers_override_earlier_ones() {
    let file = "[model]\npath = \"/file\"\n[batch]\nmax_tokens = 1000\nlinger = \"5ms\"\n";
    let environment = [
        ("BATCH__MAX_TOKENS", "2000"),
        ("PROMPT__LABELS", "good, bad"),
        ("PROMPT__HATEFUL_LABEL", "bad"),
        ("PROMPT__NORMALIZE", "false"),
        ("KAFKA__BROKERS", "a:9092,[::1]:9093"),
        ("KAFKA__PROPERTIES__SSL_CA_LOCATION", "/ca.pem"),
        ("POLICY__COMMUNITIES__Garden__BLOCK", "0.7"),
    ];
    let config = load(file, &environment);
    assert_eq!(
        (config.batch.max_tokens, config.batch.linger),
        (2000, Duration::from_millis(5))
    );
    assert_eq!(config.prompt.labels, ["good", "bad"]);
    assert_eq!(config.prompt.normalize, Normalize::None);
    assert_eq!(config.kafka.brokers, ["a:9092", "[::1]:9093"]);
    assert_eq!(
        config.kafka.properties.iter().collect::<Vec<_>>(),
        [("ssl.ca.location", "/ca.pem")]
    );
    assert_eq!(
        config.policy.communities["Garden"],
        ThresholdSettings {
            review: None,
            block: Some(0.7)
        }
    );
}

#[test]
fn a_flag_overrides_every_other_layer() {
    let (_folder, mut sources) = sources("[model]\npath = \"/file\"\n", &[("MODEL__PATH", "/environment")]);
    sources.flags = vec![("model.path", "flag".to_owned(), "--model")];
    assert_eq!(
        Config::load(&sources).unwrap().model.path.as_deref(),
        Some(Path::new("flag"))
    );
}

#[test]
fn a_relative_path_in_the_file_is_relative_to_the_file() {
    let (folder, sources) = sources("[model]\npath = \"gemma\"\n", &[("MODEL__ADAPTER", "adapter")]);
    let model = Config::load(&sources).unwrap().model;
    assert_eq!(model.path, Some(folder.path().join("gemma")));
    assert_eq!(model.adapter.as_deref(), Some(Path::new("adapter")));
}

#[test]
fn all_faults_are_reported_together() {
    let file = r#"
delivery = "exactly-once"
[kafka]
brokers = ["kafka:port"]
instance = "gpu 0"
passwort = "hunter2"
[topics]
comments = "c"
decisions = "c"
[model]
pth = "/m"
device = "tpu"
quantize = 8
[prompt]
labels = ["good", "good"]
max_windows = 0
normalize = "true"
[input]
text = "text"
[batch]
max_tokens = 100
linger = "2h"
[cache]
entries = -1
[policy]
review = 0.95
block = 0.9
not_in_scope = "skip"
[policy.communities.garden]
blok = 0.1
[storage]
url = "file:///r"
[http]
listen = "localhost"
[shutdown]
grace = 20
"#;
    let environment = [("LOG__LEVEL", "loud"), ("POLICY__COMMUNITIES__den__REVIEW", "high")];
    insta::assert_snapshot!(faults(file, &environment), @r#"
    kafka.brokers (moderatord.toml): entry 1 is not valid, expected a list of host:port addresses, without user names and passwords
    kafka.instance = "gpu 0" (moderatord.toml): expected a name of letters, digits, `.`, `_` and `-`
    topics.decisions = "c" (moderatord.toml): expected a different topic from topics.comments
    delivery = "exactly-once" (moderatord.toml): expected "exactly_once" or "at_least_once"
    model.quantize = 8 (moderatord.toml): expected "none", "int8" or "fp8"
    model.device = "tpu" (moderatord.toml): expected "auto", "cpu" or "cuda:N"
    input.text = "text" (moderatord.toml): expected a JSON pointer such as "/text" or "/payload/body", a header such as "header:ce_type", or a list of these
    prompt.labels = ["good", "good"] (moderatord.toml): expected two different labels
    prompt.normalize = "true" (moderatord.toml): expected "full", "nfc", true or false
    prompt.max_windows = 0 (moderatord.toml): expected an integer from 1 to 1024
    batch.linger = "2h" (moderatord.toml): expected a duration from "0s" to "5s"
    cache.entries = -1 (moderatord.toml): expected an integer from 0 to 16777216
    policy.review = 0.95 (moderatord.toml): review is 0.95 and block is 0.9, expected review <= block
    policy.not_in_scope = "skip" (moderatord.toml): expected "review" or "decide"
    policy.communities.den.review = "high" (environment variable MODERATORD__POLICY__COMMUNITIES__den__REVIEW): expected a number from 0.0 to 1.0
    policy.communities.garden.blok (moderatord.toml): unknown key, expected `review` or `block`
    http.listen = "localhost" (moderatord.toml): expected an address and port such as "127.0.0.1:9464"
    shutdown.grace = 20 (moderatord.toml): expected a duration from "1s" to "10m"
    log.level = "loud" (environment variable MODERATORD__LOG__LEVEL): expected "error", "warn", "info", "debug" or "trace"
    kafka.passwort (moderatord.toml): unknown key; did you mean `kafka.password_file`?
    model.pth (moderatord.toml): unknown key; did you mean `model.path`?
    storage (moderatord.toml): unknown key
    "#);
}

#[test]
fn settings_that_delivery_depends_on_cannot_be_set() {
    let reserved = [
        "isolation.level",
        "enable.auto.commit",
        "enable.auto.offset.store",
        "acks",
        "enable.idempotence",
        "transactional.id",
        "group.protocol",
        "statistics.interval.ms",
        "group.id",
        "bootstrap.servers",
    ];
    for name in reserved {
        // A quoted key, an unquoted key and an environment variable set the same setting.
        let variable = format!("KAFKA__PROPERTIES__{}", name.to_uppercase().replace('.', "_"));
        for (file, environment) in [
            (format!("{MODEL}[kafka.properties]\n\"{name}\" = \"x\"\n"), vec![]),
            (format!("{MODEL}[kafka.properties]\n{name} = 1\n"), vec![]),
            (MODEL.to_owned(), vec![(variable.as_str(), "x")]),
        ] {
            let faults = faults(&file, &environment);
            assert!(
                faults.contains("cannot be set here") && faults.lines().count() == 1,
                "{faults}"
            );
        }
    }
}

#[test]
fn only_the_stream_requires_brokers_and_topics() {
    let error = lines(&minimal().require_stream().unwrap_err());
    insta::assert_snapshot!(error, @r#"
    kafka.brokers: not set, expected at least one host:port; set it in the settings file or as MODERATORD__KAFKA__BROKERS
    topics.comments: not set, expected a topic name; set it in the settings file or as MODERATORD__TOPICS__COMMENTS
    topics.decisions: not set, expected a topic name; set it in the settings file or as MODERATORD__TOPICS__DECISIONS
    topics.dead_letters: not set, expected a topic name; set it in the settings file or as MODERATORD__TOPICS__DEAD_LETTERS
    "#);
}

const STREAM: &str = r#"
[model]
path = "/m"
[kafka]
brokers = ["kafka:9092"]
[topics]
comments = "c"
decisions = "d"
dead_letters = "l"
"#;

#[test]
fn secrets_are_read_from_files_and_never_printed() {
    let folder = tempfile::tempdir().unwrap();
    let password = folder.path().join("password");
    std::fs::write(&password, "hunter2\n").unwrap();
    let environment = [
        ("KAFKA__PASSWORD_FILE", password.to_str().unwrap()),
        ("KAFKA__PROPERTIES__SSL_KEY_PASSWORD", "hunter3"),
        ("KAFKA__PROPERTIES__SASL_USERNAME", "moderatord"),
    ];
    let config = load(STREAM, &environment);
    let stream = config.require_stream().unwrap();
    let properties: Vec<_> = stream.properties.iter().collect();
    assert!(
        properties.contains(&("sasl.password", "hunter2")),
        "a trailing line break is ignored"
    );
    assert!(!stream.instance.is_empty(), "the default is the host name");
    for printed in [format!("{config:?}"), format!("{stream:?}")] {
        assert!(
            !printed.contains("hunter") && printed.contains("<redacted>"),
            "{printed}"
        );
    }
    let file = format!("{STREAM}[kafka.properties]\nsasl.password = [\"hunter2\"]\nacks = \"hunter3\"\n");
    assert!(!faults(&file, &[]).contains("hunter"));
    let both = [environment[0], ("KAFKA__PROPERTIES__SASL_PASSWORD", "hunter2")];
    let faults = faults(STREAM, &both);
    assert!(
        faults.contains("expected one of the two") && !faults.contains("hunter"),
        "{faults}"
    );
}

#[test]
fn a_fault_shows_no_value_that_may_be_a_secret() {
    let section = |name: &str, text: &str| format!("[{name}]\n{text}\n");
    for file in [
        section("kafka", "password_file = [\"hunter2\"]"),
        section("kafka", "password_file = { a = \"hunter2\" }"),
        section("kafka", "password_file = 4711"),
        section("kafka", "brokers = [\"kafka:9092\", \"user:hunter2@kafka:9092\"]"),
        section("kafka", "brokers = [\"hunter2@kafka:9092\"]"),
        section("kafka", "brokers = [\"kafka:hunter2\"]"),
        section("kafka", "brokers = [\"SASL_SSL://user:hunter2@kafka:9092\"]"),
        section("kafka", "brokers = [\"kafka?password=hunter2\"]"),
        section("kafka", "brokers = [[\"hunter2\"]]"),
        section("kafka", "brokers = 4711"),
        section("kafka", "properties = \"sasl.password=hunter2\""),
        section("kafka", "properties = [\"sasl.password=hunter2\"]"),
        section("kafka.properties", "sasl.password = [\"hunter2\"]"),
        section("kafka.properties", "acks = \"hunter2\""),
        section("kafka", "pasword = \"hunter2\""),
        section("kafka", "pasword.file = \"hunter2\""),
        section("registry", "url = [\"s3://key:hunter2@bucket\"]"),
        section("registry", "url = 4711"),
        "kafka = \"hunter2\"\n".to_owned(),
        "registry = [\"hunter2\"]\n".to_owned(),
        "password = \"hunter2\"\n".to_owned(),
    ] {
        let found = faults(&file, &[]);
        assert!(!found.is_empty() && !found.contains("hunter2"), "{file}: {found}");
        assert!(!found.contains("4711"), "{file}: {found}");
    }
    for (name, value) in [
        ("KAFKA", "hunter2"),
        ("KAFKA__BROKERS", "user:hunter2@kafka:9092"),
        ("KAFKA__PROPERTIES", "sasl.password=hunter2"),
        ("KAFKA__PROPERTIES", "{ \"sasl.password\" = hunter2 }"),
        ("KAFKA__PROPERTIES__ACKS", "hunter2"),
        ("KAFKA__PASSWORD", "hunter2"),
        ("REGISTRY", "hunter2"),
    ] {
        let found = faults("", &[(name, value)]);
        assert!(!found.is_empty() && !found.contains("hunter2"), "{name}: {found}");
    }
    // The password itself instead of the file that contains it.
    let config = load(STREAM, &[("KAFKA__PASSWORD_FILE", "hunter2")]);
    let found = lines(&config.require_stream().unwrap_err());
    assert!(!found.is_empty() && !found.contains("hunter2"), "{found}");
}

#[test]
fn addresses_of_brokers_are_checked() {
    let is_valid = |broker: &str| {
        let (_folder, sources) = sources("", &[("KAFKA__BROKERS", broker)]);
        Config::load(&sources).is_ok()
    };
    for broker in [
        "kafka",
        "kafka-1.example.org:9092",
        "10.0.0.1:9092",
        "my_broker:1",
        "[::1]:9092",
        "[fe80::1%eth0]",
    ] {
        assert!(is_valid(broker), "{broker}");
    }
    for broker in [
        ":9092",
        "kafka:0",
        "kafka:65536",
        "kafka:",
        "::1",
        "[]:9092",
        "a b:9092",
        "user@kafka:9092",
        "a/b",
    ] {
        assert!(!is_valid(broker), "{broker}");
    }
}

#[test]
fn any_community_can_be_set_in_the_environment() {
    let file = "[policy.communities.Garden]\nreview = 0.4\n[policy.communities.GARDEN]\nreview = 0.5\n";
    let table = "{ Garden = { block = 0.6 }, \"my-garden\" = { review = 0.2, block = 0.8 }, \"r/Über uns__2\" = { review = 0.1 } }";
    let config = load(
        file,
        &[
            ("POLICY__COMMUNITIES__GARDEN__REVIEW", "0.3"),
            ("POLICY__COMMUNITIES", table),
            // The variable for a single threshold overrides the table.
            ("POLICY__COMMUNITIES__my-garden__BLOCK", "0.7"),
            (
                "KAFKA__PROPERTIES",
                "{ \"ssl.ca.location\" = \"/ca.pem\", linger.ms = 7 }",
            ),
        ],
    );
    let communities: Vec<_> = config
        .policy
        .communities
        .iter()
        .map(|(id, thresholds)| (id.as_str(), thresholds.review, thresholds.block))
        .collect();
    assert_eq!(
        communities,
        [
            ("GARDEN", Some(0.3), None),
            ("Garden", Some(0.4), Some(0.6)),
            ("my-garden", Some(0.2), Some(0.7)),
            ("r/Über uns__2", Some(0.1), None)
        ]
    );
    let properties: Vec<_> = config.kafka.properties.iter().collect();
    assert_eq!(properties, [("linger.ms", "7"), ("ssl.ca.location", "/ca.pem")]);
    for table in [
        "",
        "garden",
        "{ garden = ",
        "{}\n[kafka]",
        "[1]",
        "{ garden = 0.3 }",
        "{ garden = { reviw = 0.3 } }",
    ] {
        let found = faults("", &[("POLICY__COMMUNITIES", table)]);
        assert!(
            found.starts_with("policy.communities") && found.contains("MODERATORD__POLICY__COMMUNITIES"),
            "{table}: {found}"
        );
    }
}

#[test]
fn a_variable_in_upper_case_means_the_community_of_the_file() {
    let file = "[policy.communities]\ngardening = { review = 0.3, block = 0.8 }\nDen = { review = 0.4 }\n";
    let ids = |variables: &[(&str, &str)]| -> Vec<(String, f64)> {
        let communities = load(file, variables).policy.communities;
        communities
            .into_iter()
            .map(|(id, thresholds)| (id, thresholds.review.unwrap()))
            .collect()
    };
    let den = ("Den".to_owned(), 0.4);
    let gardening = |review| ("gardening".to_owned(), review);
    let found = ids(&[("POLICY__COMMUNITIES__GARDENING__REVIEW", "0.001")]);
    assert_eq!(found, [den.clone(), gardening(0.001)]);
    let found = ids(&[
        ("POLICY__COMMUNITIES__gArdening__REVIEW", "0.002"),
        ("POLICY__COMMUNITIES__DEN__REVIEW", "0.5"),
    ]);
    assert_eq!(found, [("Den".to_owned(), 0.5), gardening(0.002)]);
    // A community that only the environment sets, in a case that is meant, or without letters.
    let found = ids(&[
        ("POLICY__COMMUNITIES__Attic__REVIEW", "0.1"),
        ("POLICY__COMMUNITIES__42__REVIEW", "0.2"),
    ]);
    assert_eq!(
        found,
        [
            ("42".to_owned(), 0.2),
            ("Attic".to_owned(), 0.1),
            den.clone(),
            gardening(0.3)
        ]
    );
    // The table of another variable counts as well.
    let found = ids(&[
        ("POLICY__COMMUNITIES", "{ attic = { review = 0.1 } }"),
        ("POLICY__COMMUNITIES__ATTIC__REVIEW", "0.2"),
    ]);
    assert_eq!(found, [den, ("attic".to_owned(), 0.2), gardening(0.3)]);
}

#[test]
fn a_variable_whose_community_is_not_clear_is_a_fault() {
    let file = "[policy.communities]\ngarden = { review = 0.3 }\nGarden = { review = 0.4 }\n";
    let environment = [
        ("POLICY__COMMUNITIES__ATTIC__REVIEW", "0.1"),
        ("POLICY__COMMUNITIES__GARDEN__REVIEW", "0.1"),
    ];
    insta::assert_snapshot!(faults(file, &environment), @r#"
    policy.communities.ATTIC.review (environment variable MODERATORD__POLICY__COMMUNITIES__ATTIC__REVIEW): no key of [policy.communities] has this name in upper or lower case, and a variable in upper case cannot say which is meant; set it in the file, or with MODERATORD__POLICY__COMMUNITIES='{ "attic" = .. }'
    policy.communities.GARDEN.review (environment variable MODERATORD__POLICY__COMMUNITIES__GARDEN__REVIEW): `Garden` and `garden` differ only in upper and lower case; expected one of them, spelt in the same way
    "#);
}

#[test]
fn fields_and_operations_are_read_from_every_layer() {
    let file = "[input]\ntext = [\"/after/text\", \"/before/text\"]\nop = \"header:ce_type\"\n\
                [input.ops]\nc = \"create\"\n\"com.example.gone\" = \"delete\"\n";
    let environment = [("INPUT__CONTENT_ID", "/after/id,/before/id"), ("INPUT__OPS__C", "edit")];
    let fields = load(file, &environment).input.fields;
    let expected = InputFields {
        text: ["/after/text", "/before/text"].into(),
        op: "header:ce_type".into(),
        content_id: ["/after/id", "/before/id"].into(),
        ops: [
            ("c", Op::Edit),
            ("com.example.gone", Op::Delete),
            ("create", Op::Create),
            ("delete", Op::Delete),
            ("edit", Op::Edit),
        ]
        .map(|(name, op)| (name.to_owned(), op))
        .into(),
        ..InputFields::default()
    };
    assert_eq!(fields, expected);
    let found = faults(
        "[input]\ntext = []\nop = \"header:\"\n[input.ops]\nc = \"purge\"\nd = { a = 1 }\n",
        &[],
    );
    insta::assert_snapshot!(found, @r#"
    input.op = "header:" (moderatord.toml): expected a JSON pointer such as "/text" or "/payload/body", a header such as "header:ce_type", or a list of these
    input.text = [] (moderatord.toml): expected a JSON pointer such as "/text" or "/payload/body", a header such as "header:ce_type", or a list of these
    input.ops.c = "purge" (moderatord.toml): expected "create", "edit" or "delete"
    input.ops.d = {..}: expected "create", "edit" or "delete"
    "#);
}

#[test]
fn a_password_file_that_cannot_be_read_is_a_fault_only_for_the_stream() {
    let config = load(STREAM, &[("KAFKA__PASSWORD_FILE", "/nowhere/password")]);
    let error = lines(&config.require_stream().unwrap_err());
    assert!(
        error.starts_with("kafka.password_file: cannot read the password from this file: No such file"),
        "{error}"
    );
}

#[test]
fn a_settings_file_that_cannot_be_read_is_a_single_fault() {
    insta::assert_snapshot!(faults("[model\npath = 1", &[]), @"moderatord.toml: TOML parse error at line 1, column 7: unclosed table, expected `]`");
    let sources = Sources {
        file: Some("/nowhere/moderatord.toml".into()),
        ..Sources::default()
    };
    let error = lines(&Config::load(&sources).unwrap_err());
    assert!(
        error.starts_with("/nowhere/moderatord.toml: cannot read the settings file"),
        "{error}"
    );
}

#[test]
fn settings_of_judging_outside_their_range_are_faults() {
    let text = "[retrain]\ncross_fit = \"sometimes\"\nfolds = 1\nprovisional_thresholds = \"yes\"\n";
    let faults = faults(text, &[]);
    for expected in [
        "retrain.cross_fit = \"sometimes\" (moderatord.toml): expected \"auto\", \"always\" or \"never\"",
        "retrain.folds = 1 (moderatord.toml): expected",
        "retrain.provisional_thresholds = \"yes\" (moderatord.toml): expected",
    ] {
        assert!(faults.contains(expected), "{faults}");
    }
}

#[test]
fn the_state_folder_of_the_service_manager_is_the_default() {
    let state = |file: &str, variable: &str| {
        let (_folder, mut sources) = sources(file, &[]);
        sources.environment = vec![("STATE_DIRECTORY".into(), variable.into())];
        Config::load(&sources).unwrap().registry.state
    };
    assert_eq!(state("", "/var/lib/a:/var/lib/b"), Some("/var/lib/a".into()));
    assert_eq!(state("[registry]\nstate = \"/s\"\n", "/var/lib/a"), Some("/s".into()));
    assert_eq!(state("", ""), None);
    assert_eq!(minimal().registry.state, None);
    assert_eq!(minimal().registry.on_missing, OnMissing::Stop);
}

#[test]
fn the_registry_is_not_remembered_inside_itself() {
    let text = |state: &str| format!("[registry]\nurl = \"file:///r\"\nstate = \"{state}\"\non_missing = \"go\"\n");
    insta::assert_snapshot!(faults(&text("/r/state"), &[]), @r#"
    registry.on_missing = "go" (moderatord.toml): expected "stop" or "continue"
    registry.state = "/r/state" (moderatord.toml): expected a folder outside the registry, because what is remembered there must not be lost with it
    "#);
    assert!(!faults(&text("/r2"), &[]).contains("registry.state"));
}

#[test]
fn unrelated_environment_variables_are_ignored() {
    let (_folder, mut sources) = sources(MODEL, &[]);
    sources.environment = vec![
        ("MODERATORD_LOG".into(), "x".into()),
        ("PATH".into(), "/bin".into()),
        (OsString::from("MODERATORD__HTTP__LISTEN"), "[::]:80".into()),
    ];
    assert_eq!(Config::load(&sources).unwrap().http.listen.port(), 80);
}
