//! Models by name, against a server in this process that speaks the hub's API.

use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::cli_run::{Notifications, Service, free_port, moderatord};
use crate::common::process::Start;
use crate::common::{fixture, without_settings};
use moderatord::hub::{Hub, HubError, Progress, Reference};
use serde_json::json;
use sha2::{Digest, Sha256};

const ID: &str = "garden/tiny-gemma";
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const TOKEN: &str = "hf_secret";

/// What goes wrong with one request.
#[derive(Clone, Copy, PartialEq)]
enum Trouble {
    /// The answer has this status, and this header.
    Status(&'static str, &'static str),
    /// The connection ends after so many bytes of the body.
    Truncated(usize),
    /// The body has another byte than the file.
    Damaged,
    /// The range is ignored.
    WholeFile,
    /// The file has this many bytes, whatever the hub states.
    Length(usize),
    /// The body arrives in pieces, one every [`PIECE_PAUSE`]. Then the connection is silent for [`STALL`], and ends.
    Stalls { pieces: usize, piece_bytes: usize },
}

const PIECE_PAUSE: Duration = Duration::from_millis(200);
const STALL: Duration = Duration::from_secs(6);

/// What a client asked for.
#[derive(Clone, Debug)]
struct Request {
    path: String,
    host: String,
    token: Option<String>,
    range: Option<u64>,
}

#[derive(Default)]
struct State {
    files: BTreeMap<String, Vec<u8>>,
    /// What goes wrong, by a part of the path, in order.
    troubles: Vec<(&'static str, VecDeque<Trouble>)>,
    needs_token: bool,
    requests: Vec<Request>,
}

/// A hub with one repository. Files are at another address, to which the hub redirects.
struct Server {
    port: u16,
    state: Arc<Mutex<State>>,
}

impl Server {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut files = BTreeMap::new();
        for name in ["config.json", "tokenizer.json", "model.safetensors"] {
            files.insert(name.to_owned(), std::fs::read(fixture("gemma3").join(name)).unwrap());
        }
        files.insert("README.md".to_owned(), b"not needed".to_vec());
        files.insert("onnx/model.safetensors".to_owned(), b"not needed".to_vec());
        let state = Arc::new(Mutex::new(State {
            files,
            ..State::default()
        }));
        let shared = Arc::clone(&state);
        // The thread ends with the test process.
        std::thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                let shared = Arc::clone(&shared);
                std::thread::spawn(move || drop(serve(connection, port, &shared)));
            }
        });
        Self { port, state }
    }

    fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    fn trouble(&self, path: &'static str, troubles: &[Trouble]) {
        let troubles = troubles.iter().copied().collect();
        self.state.lock().unwrap().troubles.push((path, troubles));
    }

    /// Returns the requests since the last call whose path contains a part.
    fn requests(&self, part: &str) -> Vec<Request> {
        let state = self.state.lock().unwrap();
        state
            .requests
            .iter()
            .filter(|request| request.path.contains(part))
            .cloned()
            .collect()
    }

    fn forget_requests(&self) {
        self.state.lock().unwrap().requests.clear();
    }
}

/// Answers one request, and closes the connection.
fn serve(mut connection: TcpStream, port: u16, state: &Mutex<State>) -> std::io::Result<()> {
    let mut lines = BufReader::new(connection.try_clone()?).lines();
    let first = lines.next().transpose()?.unwrap_or_default();
    let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut headers = BTreeMap::new();
    for line in lines {
        let line = line?;
        let Some((name, value)) = line.split_once(": ") else {
            break;
        };
        headers.insert(name.to_lowercase(), value.to_owned());
    }
    let header = |name: &str| headers.get(name).cloned();
    let range = header("range").map(|range| {
        range
            .trim_start_matches("bytes=")
            .trim_end_matches('-')
            .parse()
            .unwrap()
    });
    let token = header("authorization");
    let (trouble, files, is_refused) = {
        let mut state = state.lock().unwrap();
        state.requests.push(Request {
            path: path.clone(),
            host: header("host").unwrap_or_default(),
            token: token.clone(),
            range,
        });
        let trouble = state.troubles.iter_mut().find(|(part, _)| path.contains(part));
        let trouble = trouble.and_then(|(_, troubles)| troubles.pop_front());
        let is_refused = state.needs_token && token.as_deref() != Some(&format!("Bearer {TOKEN}"));
        (trouble, state.files.clone(), is_refused && !path.starts_with("/cdn/"))
    };
    let mut answer = |status: &str, headers: &str, body: &[u8]| {
        let length = body.len();
        write!(
            connection,
            "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n"
        )?;
        connection.write_all(body)
    };
    if let Some(Trouble::Status(status, header)) = trouble {
        return answer(status, &format!("{header}\r\n"), b"");
    }
    if is_refused {
        return answer("401 Unauthorized", "X-Error-Code: GatedRepo\r\n", b"");
    }
    let info = |commit: &str| {
        let sibling = |(name, bytes): (&String, &Vec<u8>)| {
            let mut sibling =
                json!({"rfilename": name, "size": bytes.len(), "blobId": format!("{:040x}", bytes.len())});
            if name.ends_with(".safetensors") {
                sibling["lfs"] = json!({"sha256": sha256(bytes), "size": bytes.len(), "pointerSize": 134});
            }
            sibling
        };
        json!({"id": ID, "sha": commit, "siblings": files.iter().map(sibling).collect::<Vec<_>>()}).to_string()
    };
    if let Some(revision) = path.strip_prefix(&format!("/api/models/{ID}/revision/")) {
        return match revision.split('?').next().unwrap_or_default() {
            "main" | COMMIT | "refs%2Fpr%2F1" => answer("200 OK", "", info(COMMIT).as_bytes()),
            _ => answer("404 Not Found", "X-Error-Code: RevisionNotFound\r\n", b""),
        };
    }
    if let Some(name) = path.strip_prefix(&format!("/{ID}/resolve/{COMMIT}/")) {
        let location = format!("Location: http://localhost:{port}/cdn/{name}?signature=1\r\n");
        return answer("302 Found", &location, b"");
    }
    let name = path
        .strip_prefix("/cdn/")
        .map(|name| name.trim_end_matches("?signature=1"));
    let Some(file) = name.and_then(|name| files.get(name)) else {
        return answer("404 Not Found", "X-Error-Code: RepoNotFound\r\n", b"");
    };
    let mut file = file.clone();
    if trouble == Some(Trouble::Damaged) {
        file[100] ^= 1;
    }
    if let Some(Trouble::Length(length)) = trouble {
        file.resize(length, 0);
        if range.is_some_and(|from| from >= length as u64) {
            return answer("416 Range Not Satisfiable", "", b"");
        }
    }
    let (status, headers, body) = match range {
        Some(from) if trouble != Some(Trouble::WholeFile) => {
            let from = usize::try_from(from).unwrap();
            let range = format!("Content-Range: bytes {from}-{}/{}\r\n", file.len() - 1, file.len());
            ("206 Partial Content", range, file[from..].to_vec())
        }
        _ => ("200 OK", String::new(), file),
    };
    let (pieces, piece_bytes, silence) = match trouble {
        Some(Trouble::Truncated(bytes)) => (1, bytes, Duration::ZERO),
        Some(Trouble::Stalls { pieces, piece_bytes }) => (pieces, piece_bytes, STALL),
        _ => return answer(status, &headers, &body),
    };
    let length = body.len();
    write!(
        connection,
        "HTTP/1.1 {status}\r\nContent-Length: {length}\r\n{headers}\r\n"
    )?;
    for (index, piece) in body.chunks(piece_bytes).take(pieces).enumerate() {
        if index > 0 {
            std::thread::sleep(PIECE_PAUSE);
        }
        connection.write_all(piece)?;
    }
    std::thread::sleep(silence);
    Ok(())
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn hub(server: &Server, cache: &Path, token: Option<&str>) -> Hub {
    let hub = Hub::new(&server.endpoint(), cache, token.map(str::to_owned));
    hub.with_longest_pause(Duration::from_millis(20))
}

fn main_branch() -> Reference {
    Reference::parse(&format!("hf://{ID}")).unwrap()
}

/// Returns the reasons for which requests were sent again.
fn fetch(hub: &Hub, reference: &Reference) -> (Result<moderatord::hub::Snapshot, HubError>, Vec<String>) {
    let mut retries = Vec::new();
    let fetched = hub.fetch(reference, &mut |progress| {
        if let Progress::Retry { reason, .. } = progress {
            retries.push(reason.to_owned());
        }
    });
    (fetched, retries)
}

fn assert_complete(folder: &Path) {
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        let expected = std::fs::read(fixture("gemma3").join(name)).unwrap();
        assert!(std::fs::read(folder.join(name)).unwrap() == expected, "{name} differs");
    }
}

#[test]
fn a_model_is_downloaded_once_into_the_layout_of_python() {
    let (server, cache) = (Server::start(), tempfile::tempdir().unwrap());
    let hub = hub(&server, cache.path(), Some(TOKEN));
    assert!(
        matches!(hub.cached(&main_branch()), Err(HubError::Refused(text)) if text.contains("`moderatord fetch hf://garden/tiny-gemma@main`"))
    );
    let (snapshot, retries) = fetch(&hub, &main_branch());
    let snapshot = snapshot.unwrap();
    assert_eq!((snapshot.commit.as_str(), retries.len()), (COMMIT, 0));
    let repo = cache.path().join("models--garden--tiny-gemma");
    assert_eq!(snapshot.folder, repo.join("snapshots").join(COMMIT));
    assert_eq!(std::fs::read_to_string(repo.join("refs/main")).unwrap(), COMMIT);
    let weights = sha256(&std::fs::read(fixture("gemma3/model.safetensors")).unwrap());
    let link = std::fs::read_link(snapshot.folder.join("model.safetensors")).unwrap();
    assert_eq!(link, Path::new("../../blobs").join(&weights));
    assert_complete(&snapshot.folder);
    assert!(!snapshot.folder.join("README.md").exists() && !snapshot.folder.join("onnx").exists());
    // The token is for the hub, and not for the host that it redirects to.
    let requests = server.requests("");
    assert!(requests.iter().any(|request| request.path.starts_with("/cdn/")));
    for request in requests {
        let is_hub = request.host.starts_with("127.0.0.1");
        assert_eq!(request.token.is_some(), is_hub, "{request:?}");
    }
    // Nothing is downloaded again: the branch is looked up, and a commit not even that.
    server.forget_requests();
    assert_eq!(fetch(&hub, &main_branch()).0.unwrap(), snapshot);
    assert!(server.requests("resolve").is_empty() && server.requests("/api/").len() == 1);
    let commit = Reference::parse(&format!("hf://{ID}@{COMMIT}")).unwrap();
    assert_eq!(fetch(&hub, &commit).0.unwrap(), snapshot);
    assert_eq!(hub.cached(&commit).unwrap(), snapshot);
    assert_eq!(hub.cached(&main_branch()).unwrap(), snapshot);
    assert_eq!(server.requests("").len(), 1);
    // A revision with a slash is one part of an address, and two of a path.
    let (pull, _) = fetch(&hub, &Reference::parse(&format!("hf://{ID}@refs/pr/1")).unwrap());
    assert_eq!(pull.unwrap(), snapshot);
    // A folder that lacks a file is not used.
    std::fs::remove_file(snapshot.folder.join("model.safetensors")).unwrap();
    let error = hub.cached(&commit).unwrap_err().to_string();
    assert!(error.contains("has no model.safetensors in the cache"), "{error}");
}

#[test]
fn a_download_that_breaks_off_is_continued() {
    let (server, cache) = (Server::start(), tempfile::tempdir().unwrap());
    let hub = hub(&server, cache.path(), None);
    server.trouble(
        "/cdn/model.safetensors",
        &[Trouble::Truncated(1000), Trouble::Truncated(500), Trouble::WholeFile],
    );
    let (snapshot, retries) = fetch(&hub, &main_branch());
    assert_complete(&snapshot.unwrap().folder);
    assert_eq!(retries.len(), 2, "{retries:?}");
    let ranges: Vec<_> = server
        .requests("/cdn/model")
        .into_iter()
        .map(|request| request.range)
        .collect();
    assert_eq!(ranges, [None, Some(1000), Some(1500)]);
    // What an earlier process left is continued too.
    let repo = cache.path().join("models--garden--tiny-gemma");
    let weights = std::fs::read(fixture("gemma3/model.safetensors")).unwrap();
    let blob = repo.join("blobs").join(sha256(&weights));
    std::fs::remove_file(&blob).unwrap();
    std::fs::write(blob.with_extension("incomplete"), &weights[..2000]).unwrap();
    server.forget_requests();
    assert_complete(&fetch(&hub, &main_branch()).0.unwrap().folder);
    assert_eq!(server.requests("/cdn/model")[0].range, Some(2000));
}

/// A mirror that serves another file than the hub describes is asked only a few times.
#[test]
fn a_file_of_another_size_is_an_error() {
    let stated = std::fs::metadata(fixture("gemma3/model.safetensors")).unwrap().len();
    for (length, part) in [(stated - 100, "after 6 attempts"), (stated + 100, "bytes arrived")] {
        let (server, cache) = (Server::start(), tempfile::tempdir().unwrap());
        let hub = hub(&server, cache.path(), None);
        server.trouble("/cdn/model", &[Trouble::Length(usize::try_from(length).unwrap()); 40]);
        let error = fetch(&hub, &main_branch()).0.unwrap_err();
        assert!(
            matches!(&error, HubError::Failed(text) if text.contains(part)),
            "{error}"
        );
        assert!(server.requests("/cdn/model").len() < 20);
        assert!(hub.cached(&main_branch()).is_err());
    }
}

/// A commit in the cache is complete only with all files that it needs.
#[test]
fn what_an_interrupted_download_of_a_commit_lacks_is_downloaded() {
    let (server, cache) = (Server::start(), tempfile::tempdir().unwrap());
    let hub = hub(&server, cache.path(), None);
    let commit = Reference::parse(&format!("hf://{ID}@{COMMIT}")).unwrap();
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        let folder = fetch(&hub, &commit).0.unwrap().folder;
        std::fs::remove_file(folder.join(name)).unwrap();
        assert!(hub.cached(&commit).is_err(), "{name}");
        assert_complete(&fetch(&hub, &commit).0.unwrap().folder);
    }
}

#[test]
fn a_reference_is_as_readable_as_the_other_files() {
    use std::os::unix::fs::PermissionsExt;
    let (server, cache) = (Server::start(), tempfile::tempdir().unwrap());
    let folder = fetch(&hub(&server, cache.path(), None), &main_branch())
        .0
        .unwrap()
        .folder;
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode();
    let reference = cache.path().join("models--garden--tiny-gemma/refs/main");
    assert_eq!(mode(&reference), mode(&folder.join("config.json")));
}

#[test]
fn damaged_weights_are_never_used() {
    let (server, cache) = (Server::start(), tempfile::tempdir().unwrap());
    let hub = hub(&server, cache.path(), None);
    server.trouble("/cdn/model", &[Trouble::Damaged, Trouble::Damaged]);
    let error = fetch(&hub, &main_branch()).0.unwrap_err();
    assert!(
        matches!(&error, HubError::Failed(text) if text.contains("model.safetensors has the SHA-256") && text.contains("expected")),
        "{error}"
    );
    assert!(hub.cached(&main_branch()).is_err());
    // The beginning that another download left is damaged: the file is downloaded as a whole.
    let blob = sha256(&std::fs::read(fixture("gemma3/model.safetensors")).unwrap());
    let blobs = cache.path().join("models--garden--tiny-gemma/blobs");
    std::fs::write(blobs.join(format!("{blob}.incomplete")), [0; 3000]).unwrap();
    let (snapshot, retries) = fetch(&hub, &main_branch());
    assert_complete(&snapshot.unwrap().folder);
    assert!(retries[0].contains("SHA-256"), "{retries:?}");
}

#[test]
fn a_busy_hub_is_asked_again_and_a_refusal_is_explained() {
    let (server, cache) = (Server::start(), tempfile::tempdir().unwrap());
    let anonymous = hub(&server, cache.path(), None);
    let busy = Trouble::Status("429 Too Many Requests", "Retry-After: 0");
    let down = Trouble::Status("503 Service Unavailable", "Server: x");
    server.trouble("/api/", &[busy, down]);
    server.trouble("/resolve/", &[busy]);
    let (snapshot, retries) = fetch(&anonymous, &main_branch());
    assert_complete(&snapshot.unwrap().folder);
    assert!(retries.len() == 3 && retries[0].contains("429"), "{retries:?}");
    let cache = tempfile::tempdir().unwrap();
    let hub_with = |token: Option<&str>| hub(&server, cache.path(), token);
    let refusal = |hub: &Hub, reference: &Reference| match fetch(hub, reference).0.unwrap_err() {
        HubError::Refused(text) => text,
        error => panic!("{error}"),
    };
    let other = Reference::parse(&format!("hf://{ID}@v9")).unwrap();
    let text = refusal(&hub_with(None), &other);
    assert!(text.contains("no revision `v9`"), "{text}");
    let text = refusal(&hub_with(None), &Reference::parse("hf://garden/nothing").unwrap());
    assert!(text.contains("404") && text.contains("check the name at"), "{text}");
    server.state.lock().unwrap().needs_token = true;
    let text = refusal(&hub_with(None), &main_branch());
    assert!(
        text.contains("Accept the licence at http://127.0.0.1") && text.contains("set HF_TOKEN"),
        "{text}"
    );
    let text = refusal(&hub_with(Some("hf_wrong")), &main_branch());
    assert!(
        text.contains("the token is not valid") && !text.contains("hf_wrong"),
        "{text}"
    );
    server.trouble(
        "/revision/main",
        &[Trouble::Status("403 Forbidden", "X-Error-Code: GatedRepo")],
    );
    server.state.lock().unwrap().troubles.rotate_right(1);
    let text = refusal(&hub_with(Some(TOKEN)), &main_branch());
    assert!(
        text.contains("has no access") && text.contains(&format!("/{ID}")) && !text.contains(TOKEN),
        "{text}"
    );
    assert_complete(&fetch(&hub_with(Some(TOKEN)), &main_branch()).0.unwrap().folder);
    // A hub that stays busy is a failure that may pass.
    server.trouble("/revision/", &[busy; 9]);
    server.state.lock().unwrap().troubles.rotate_right(1);
    let (failed, retries) = fetch(&hub_with(Some(TOKEN)), &main_branch());
    assert!(matches!(failed, Err(HubError::Failed(text)) if text.contains("after 6 attempts")));
    assert_eq!(retries.len(), 5);
}

#[test]
fn commands_find_models_by_name_and_download_only_if_they_may() {
    let (server, cache) = (Server::start(), tempfile::tempdir().unwrap());
    server.state.lock().unwrap().needs_token = true;
    let token = cache.path().join("token");
    std::fs::write(&token, format!("{TOKEN}\n")).unwrap();
    let run = |args: &[&str], environment: &[(&str, &str)]| {
        let output = without_settings(env!("CARGO_BIN_EXE_moderatord"))
            .args(args)
            .env("HF_ENDPOINT", server.endpoint())
            .env("HF_HUB_CACHE", cache.path().join("hub"))
            .env_remove("HF_TOKEN")
            .env_remove("HF_HOME")
            .env("HF_TOKEN_PATH", &token)
            .envs(environment.iter().copied())
            .finish()
            .unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    let name = format!("hf://{ID}");
    let score = ["score", "--model", &name, "--text", "see you at the garden"];
    for args in [&["check", "--model", &name][..], &["run", "--model", &name], &score] {
        let (code, _, err) = run(args, &[]);
        assert!(
            code == Some(78) && err.contains("model.path: hf://garden/tiny-gemma@main is not in the cache"),
            "{args:?}: {err}"
        );
        assert!(err.contains("`moderatord fetch hf://garden/tiny-gemma@main`"), "{err}");
    }
    assert!(server.requests("").is_empty(), "a command asked the hub without leave");
    let (code, out, err) = run(&["fetch", &name], &[]);
    assert_eq!(code, Some(0), "{err}");
    assert!(out.contains(&format!("commit    {COMMIT}\nfolder    ")), "{out}");
    let (code, out, err) = run(&["check", "--model", &name], &[]);
    assert_eq!(code, Some(0), "{err}");
    assert!(
        out.starts_with(&format!(
            "source    hf://{ID}@main, commit {COMMIT}\nmodel     gemma3_text"
        )),
        "{out}"
    );
    let (code, _, err) = run(&["fetch", "hf://garden"], &[]);
    assert!(code == Some(64) && err.contains("expected hf://owner/name"), "{err}");
    let (code, _, err) = run(&["fetch", &name], &[("HF_TOKEN", "hf_wrong")]);
    assert!(
        code == Some(78) && err.contains("the token is not valid") && !err.contains("hf_wrong"),
        "{err}"
    );
    // A token that has expired stops no service whose model is in the cache.
    let expired = [("HF_TOKEN", "hf_wrong"), ("MODERATORD__MODEL__DOWNLOAD", "true")];
    let (code, out, err) = run(&score, &expired);
    assert!(code == Some(0) && out.contains("\"probability\""), "{err}");
    // With leave, `score` downloads it.
    std::fs::remove_dir_all(cache.path().join("hub")).unwrap();
    let (code, out, err) = run(&score, &[("MODERATORD__MODEL__DOWNLOAD", "true")]);
    assert!(code == Some(0) && out.contains("\"probability\""), "{err}");
}

/// The service manager gives a start more time while a download makes progress, and not while it stalls.
#[test]
fn a_download_at_the_start_of_a_service_extends_the_start_until_it_stalls() {
    let (server, folder) = (Server::start(), tempfile::tempdir().unwrap());
    server.trouble(
        "/cdn/model",
        &[Trouble::Stalls {
            pieces: 15,
            piece_bytes: 100,
        }],
    );
    let notifications = Notifications::bind(&folder.path().join("notify"));
    let service = moderatord()
        .args(["serve", "--model", &format!("hf://{ID}")])
        .env("NOTIFY_SOCKET", folder.path().join("notify"))
        .env("HF_ENDPOINT", server.endpoint())
        .env("HF_HUB_CACHE", folder.path().join("hub"))
        .env("HF_TOKEN", TOKEN)
        .env("MODERATORD__MODEL__DOWNLOAD", "true")
        .env("MODERATORD__HTTP__LISTEN", format!("127.0.0.1:{}", free_port()))
        .env("MODERATORD__API__LISTEN", format!("127.0.0.1:{}", free_port()))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(folder.path().join("log")).unwrap())
        .start()
        .unwrap();
    let service = Service(service);
    // It is silent while the connection is, although the weights are not complete.
    let reports = notifications.until_silence(STALL / 2);
    let extension = "EXTEND_TIMEOUT_USEC=600000000\nSTATUS=";
    assert_eq!(reports[0], format!("{extension}asking the hub for hf://{ID}@main"));
    let start = format!("{extension}downloading hf://{ID}@main: ");
    assert!(reports[1..].iter().all(|text| text.starts_with(&start)), "{reports:?}");
    // The weights arrive for three seconds, with a report every second.
    let of_weights = reports.iter().filter(|text| text.ends_with(" of model.safetensors"));
    assert!(of_weights.count() >= 2, "{reports:?}");
    // The rest is downloaded after the connection has ended.
    let before = notifications.await_ready();
    let retried = format!("STATUS=waiting for the hub to send hf://{ID}@main");
    assert!(before.iter().any(|text| text.ends_with(&retried)), "{before:?}");
    for step in ["loading the model", "warming up the model"] {
        let expected = format!("EXTEND_TIMEOUT_USEC=600000000\nSTATUS={step}");
        assert!(before.contains(&expected), "{before:?}");
    }
    service.signal("TERM");
    let log = std::fs::read_to_string(folder.path().join("log")).unwrap();
    assert_eq!(service.end(), Some(0), "{log}");
}
