//! Checks that dependencies between modules point one way.
//!
//! `lib.rs` and the `mod.rs` of each folder in [`LAYERED`] declare their modules from the bottom up: a module may use
//! only modules that are declared before it. The stages of the stream may not use each other at all.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The folders whose modules are layers, as module paths; the empty path is that of `lib.rs`.
const LAYERED: [&str; 6] = ["", "model", "stream", "api", "retrain", "retrain::judge"];

/// Modules of a folder that must not use each other, regardless of their order.
const INDEPENDENT: [(&str, &[&str]); 1] = [("stream", &["ingest", "encode", "score", "emit"])];

/// A use of a module: the file that contains it, the module of that file, and the path that is used.
#[derive(Debug)]
struct Edge {
    file: PathBuf,
    user: Vec<String>,
    used: Vec<String>,
}

/// The source files below a folder.
struct SourceTree {
    /// The path and text of each file, by module path; the root of the crate is the empty path.
    sources: BTreeMap<Vec<String>, (PathBuf, String)>,
}

impl SourceTree {
    fn read(root: &Path) -> Self {
        let mut sources = BTreeMap::new();
        collect(root, &mut Vec::new(), &mut sources);
        Self { sources }
    }

    /// Returns the modules that a module declares, in the order of their declarations.
    fn declared(&self, module: &[String]) -> Vec<String> {
        let (_, source) = &self.sources[module];
        let declaration = |line: &str| {
            let line = line.strip_suffix(';')?;
            let (visibility, name) = line.rsplit_once("mod ").filter(|(before, _)| !before.contains("//"))?;
            (visibility.is_empty() || visibility.starts_with("pub")).then(|| name.to_owned())
        };
        source.lines().filter_map(declaration).collect()
    }

    /// Returns the names that a folder re-exports, each with the module that it comes from.
    fn exported(&self, module: &[String]) -> BTreeMap<String, String> {
        let Some((_, source)) = self.sources.get(module) else {
            return BTreeMap::new();
        };
        let mut exported = BTreeMap::new();
        for tree in statements(source, "pub use ").chain(statements(source, "pub(crate) use ")) {
            for path in expand(tree) {
                if let [from, .., name] = &path[..] {
                    exported.insert(name.clone(), from.clone());
                }
            }
        }
        exported
    }

    /// Returns every use of a path that begins with `crate`, `super` or `self`.
    fn edges(&self) -> Vec<Edge> {
        let mut edges = Vec::new();
        for (module, (file, source)) in &self.sources {
            // Comments may refer to any module.
            let code: Vec<&str> = source
                .lines()
                .filter(|line| !line.trim_start().starts_with("//"))
                .collect();
            for path in paths(&code.join("\n")) {
                // In the test module of a file, `super` is the file itself. Such paths are resolved one level too high,
                // and therefore usually ignored.
                let mut used = module.clone();
                let mut rest = path.iter().peekable();
                match path[0].as_str() {
                    "crate" => {
                        used.clear();
                        rest.next();
                    }
                    _ => {
                        rest.next_if(|part| *part == "self");
                        while rest.next_if(|part| *part == "super").is_some() {
                            used.pop();
                        }
                    }
                }
                used.extend(rest.cloned());
                edges.push(Edge {
                    file: file.clone(),
                    user: module.clone(),
                    used,
                });
            }
        }
        edges
    }

    /// Returns the uses of modules that a folder declares after the user, or that must not be used at all.
    ///
    /// Each is described as `FILE uses FILE`.
    fn upward_uses(&self, folder: &str) -> Vec<String> {
        let folder: Vec<String> = folder
            .split("::")
            .filter(|part| !part.is_empty())
            .map(str::to_owned)
            .collect();
        let order = self.declared(&folder);
        let exported = self.exported(&folder);
        let rank = |name: &String| order.iter().position(|declared| declared == name);
        let independent = INDEPENDENT
            .iter()
            .find(|(name, _)| *name == folder.join("::"))
            .map_or(&[][..], |(_, names)| *names);
        let mut upward = Vec::new();
        for Edge { file, user, used } in self.edges() {
            let (Some([user, ..]), Some([used, ..])) = (user.strip_prefix(&folder[..]), used.strip_prefix(&folder[..]))
            else {
                continue;
            };
            // A re-exported name counts as a use of the module that it comes from.
            let used = exported.get(used).unwrap_or(used);
            let (Some(user_rank), Some(used_rank)) = (rank(user), rank(used)) else {
                continue;
            };
            let is_independent = |name: &String| independent.contains(&name.as_str());
            if used_rank > user_rank || (user != used && is_independent(user) && is_independent(used)) {
                let target = self.file_of(&folder, used);
                upward.push(format!("{} uses {}", file.display(), target.display()));
            }
        }
        upward.sort();
        upward.dedup();
        upward
    }

    fn file_of(&self, folder: &[String], module: &str) -> PathBuf {
        let path = [folder, &[module.to_owned()]].concat();
        self.sources
            .get(&path)
            .map(|(file, _)| file.clone())
            .unwrap_or_default()
    }
}

/// Reads every source file below a folder.
fn collect(folder: &Path, module: &mut Vec<String>, sources: &mut BTreeMap<Vec<String>, (PathBuf, String)>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let stem = path.file_stem().unwrap().to_str().unwrap().to_owned();
        if path.is_dir() {
            module.push(stem);
            collect(&path, module, sources);
            module.pop();
        } else if path.extension().is_some_and(|extension| extension == "rs") && stem != "main" {
            let source = std::fs::read_to_string(&path).unwrap();
            let mut name = module.clone();
            if stem != "mod" && stem != "lib" {
                name.push(stem);
            }
            sources.insert(name, (path, source));
        }
    }
}

/// Returns each statement that begins with `keyword`, without the keyword and the semicolon.
fn statements<'a>(source: &'a str, keyword: &'a str) -> impl Iterator<Item = &'a str> {
    source
        .split_inclusive(';')
        .filter_map(move |statement| statement.trim_start().strip_prefix(keyword)?.strip_suffix(';'))
}

/// Returns the paths of a use tree: `a::{b, c::d}` gives `a::b` and `a::c::d`.
fn expand(tree: &str) -> Vec<Vec<String>> {
    let tree = tree.trim();
    let Some(open) = tree.find('{') else {
        let path = tree.split(" as ").next().unwrap_or_default();
        let parts = path.split("::").map(str::trim).filter(|part| !part.is_empty());
        return vec![
            parts
                .filter(|part| *part != "self" || path.starts_with("self"))
                .map(str::to_owned)
                .collect(),
        ];
    };
    let head: Vec<String> = tree[..open]
        .split("::")
        .map(str::trim)
        .filter(|part| !part.is_empty())
        .map(str::to_owned)
        .collect();
    let inner = &tree[open + 1..];
    let (mut depth, mut start, mut paths) = (0, 0, Vec::new());
    for (index, letter) in inner.char_indices() {
        match letter {
            '{' => depth += 1,
            '}' if depth > 0 => depth -= 1,
            ',' | '}' if depth == 0 => {
                let part = &inner[start..index];
                if !part.trim().is_empty() {
                    paths.extend(expand(part).into_iter().map(|path| [head.clone(), path].concat()));
                }
                start = index + 1;
                if letter == '}' {
                    break;
                }
            }
            _ => {}
        }
    }
    paths
}

/// Returns every path in the code that begins with `crate`, `super` or `self`, with use trees expanded.
fn paths(code: &str) -> Vec<Vec<String>> {
    let mut paths = Vec::new();
    for root in ["crate::", "super::", "self::"] {
        for (start, _) in code.match_indices(root) {
            let before = code[..start].chars().next_back();
            if before.is_some_and(|letter| letter.is_alphanumeric() || letter == '_' || letter == ':') {
                continue;
            }
            paths.extend(expand(path_at(&code[start..])));
        }
    }
    paths
}

/// Returns the path or use tree at the beginning of a text.
fn path_at(text: &str) -> &str {
    let mut depth = 0;
    for (index, letter) in text.char_indices() {
        match letter {
            '{' if text[..index].ends_with("::") || depth > 0 => depth += 1,
            '}' if depth > 1 => depth -= 1,
            '}' if depth == 1 => return &text[..=index],
            _ if depth > 0 => {}
            ':' | '_' => {}
            letter if letter.is_alphanumeric() => {}
            _ => return &text[..index],
        }
    }
    text
}

fn source_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

#[test]
fn no_module_uses_a_module_of_a_higher_layer() {
    let tree = SourceTree::read(&source_root());
    let uses: Vec<String> = LAYERED.iter().flat_map(|folder| tree.upward_uses(folder)).collect();
    assert!(uses.is_empty(), "upward uses:\n{}", uses.join("\n"));
    // If a change made the parser find nothing, the check above would pass without checking anything.
    assert!(tree.declared(&[]).len() > 10, "{:?}", tree.declared(&[]));
    assert!(tree.edges().len() > 500, "{} edges", tree.edges().len());
}

#[test]
fn a_planted_upward_use_is_reported_with_both_files() {
    let folder = tempfile::tempdir().unwrap();
    let write = |file: &str, text: &str| {
        let path = folder.path().join(file);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    write(
        "lib.rs",
        "//! Docs: `mod nothing;`\npub mod ground;\npub mod stream;\npub mod top;\n",
    );
    write("ground.rs", "// crate::top is a comment\nuse std::fmt;\n");
    write("top.rs", "use crate::{ground::{A, B}, stream::Record};\n");
    write(
        "stream/mod.rs",
        "pub mod record;\n#[cfg(test)]\nmod tools;\n\npub mod ingest;\npub mod emit;\npub mod pipeline;\npub use record::Record;\n",
    );
    write("stream/record.rs", "use crate::ground;\n");
    write("stream/tools.rs", "use super::Record;\n");
    write(
        "stream/ingest.rs",
        "use super::Record;\nuse super::record::{self, Header};\n",
    );
    write("stream/emit.rs", "use crate::stream::Record;\n");
    write("stream/pipeline.rs", "use super::{emit, ingest::Stage};\n");
    let upward = |folder_name: &str| {
        let uses = SourceTree::read(folder.path()).upward_uses(folder_name);
        let root = format!("{}/", folder.path().display());
        uses.iter().map(|line| line.replace(&root, "")).collect::<Vec<_>>()
    };
    assert_eq!(upward(""), [""; 0]);
    assert_eq!(upward("stream"), [""; 0]);

    write("ground.rs", "fn f() -> crate::top::Thing { todo!() }\n");
    assert_eq!(upward(""), ["ground.rs uses top.rs"]);
    write(
        "stream/record.rs",
        "mod tests {\n    use super::super::emit::Stage;\n}\nuse crate::stream::{pipeline, Record};\n",
    );
    assert_eq!(upward("stream"), ["stream/record.rs uses stream/pipeline.rs"]);
    // Stages must not use each other even if the order would allow it.
    write("stream/record.rs", "");
    write("stream/emit.rs", "use super::ingest::Stage;\n");
    assert_eq!(upward("stream"), ["stream/emit.rs uses stream/ingest.rs"]);
}
