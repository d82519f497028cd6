//! Requests to the API beside the stream, in a whole daemon.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::broker::{Broker, PATIENCE};
use crate::common::process::broker_down;
use crate::daemon::{Names, eventually};
use crate::flow::{assert_each_once, comment};
use crate::process::{Process, settings};

/// The comments of the stream.
const COMMENTS: usize = 2000;

const PARTITIONS: usize = 4;

/// The callers, each of which asks for so many comments at a time.
const CALLERS: usize = 4;
const ASKED: usize = 16;

fn text(id: usize) -> String {
    format!("see you at the garden, number {id}")
}

/// Asks for the scores of comments. Returns the status and the body, or `None` if the connection is refused or closed
/// without an answer.
fn ask(port: u16, ids: impl Iterator<Item = usize>) -> Option<(u16, Value)> {
    let comments: Vec<Value> = ids.map(|id| json!({"content_id": id, "text": text(id)})).collect();
    send(port, "/v1/score", &json!(comments))
}

/// Suggests a score for a comment. Returns what [`ask`] does.
fn suggest(port: u16, text: &str) -> Option<(u16, Value)> {
    let scores = json!({"IDENTITY_ATTACK": {"summaryScore": {"value": 0.25}}});
    let suggestion = json!({"comment": {"text": text}, "attributeScores": scores});
    send(port, "/v1alpha1/comments:suggestscore", &suggestion)
}

fn send(port: u16, path: &str, body: &Value) -> Option<(u16, Value)> {
    let body = body.to_string();
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).ok()?;
    stream.write_all(body.as_bytes()).ok()?;
    let mut answer = String::new();
    // A connection that is closed has either a whole answer or none.
    stream.read_to_string(&mut answer).ok().filter(|&length| length > 0)?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Some((status, serde_json::from_str(body).unwrap()))
}

/// Returns the margin of each decision by the number of its comment.
fn margins(decisions: &[Value]) -> BTreeMap<String, f64> {
    let margin = |decision: &Value| {
        let id = decision["content_id"].as_str().unwrap().trim_start_matches('c');
        (id.to_owned(), decision["margin"].as_f64().unwrap())
    };
    decisions.iter().map(margin).collect()
}

#[test]
fn requests_and_the_stream_get_the_same_margins_side_by_side_and_both_end_well() {
    let broker = Broker::start();
    let names = Names::create(&broker, "requests", PARTITIONS as i32);
    let folder = tempfile::tempdir().unwrap();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let fast = "\"session.timeout.ms\" = 3000\n\"heartbeat.interval.ms\" = 300\n\"fetch.wait.max.ms\" = 10\n";
    let settings = settings(&broker.address(), &names, "one", fast);
    let variables = [
        ("MODERATORD__API__LISTEN", format!("127.0.0.1:{port}")),
        ("MODERATORD__CACHE__ENTRIES", "0".to_owned()),
        ("MODERATORD__DELIVERY", broker.delivery().as_str().to_owned()),
    ];
    let mut process = Process::spawn(folder.path(), "one", &settings, &variables);
    eventually("the API answers", || {
        ask(port, 0..1).is_some_and(|(status, _)| status == 200)
    });

    let events: Vec<Vec<u8>> = (0..COMMENTS).map(|id| comment(id, &text(id))).collect();
    let records = events.iter().enumerate();
    broker.produce(
        &names.comments,
        records.map(|(id, event)| ((id % PARTITIONS) as i32, "k", Some(event.as_slice()))),
    );
    let (is_stopping, served_meanwhile) = (AtomicBool::new(false), AtomicUsize::new(0));
    let answered = std::thread::scope(|scope| {
        let callers: Vec<_> = (0..CALLERS)
            .map(|caller| {
                let (is_stopping, served_meanwhile) = (&is_stopping, &served_meanwhile);
                scope.spawn(move || {
                    let mut answered: Vec<Value> = Vec::new();
                    for begin in (caller * ASKED..).step_by(CALLERS * ASKED) {
                        match ask(port, (begin..begin + ASKED).map(|id| id % COMMENTS)) {
                            Some((200, decisions)) => {
                                if !is_stopping.load(Ordering::SeqCst) {
                                    served_meanwhile.fetch_add(1, Ordering::SeqCst);
                                }
                                answered.extend(decisions.as_array().unwrap().iter().cloned());
                            }
                            // While the daemon stops, requests are refused, but none is answered in part.
                            Some((503, _)) | None if is_stopping.load(Ordering::SeqCst) => break,
                            other => panic!("{other:?}"),
                        }
                    }
                    answered
                })
            })
            .collect();
        let share = COMMENTS / PARTITIONS;
        eventually("every comment is committed", || {
            broker.committed(&names.group, &names.comments, PARTITIONS as i32) == [share as i64; PARTITIONS]
        });
        is_stopping.store(true, Ordering::SeqCst);
        process.signal("TERM");
        callers
            .into_iter()
            .flat_map(|caller| caller.join().unwrap())
            .collect::<Vec<_>>()
    });
    assert_eq!(process.wait(), Some(0), "{}", process.log());

    let decisions = broker.read(&names.decisions);
    assert_each_once(&decisions, &[], &[(COMMENTS / PARTITIONS) as i64; PARTITIONS]);
    let decisions: Vec<Value> = decisions.iter().map(crate::broker::OutputRecord::json).collect();
    let (streamed, requested) = (margins(&decisions), margins(&answered));
    // The stream did not starve the callers: as long as it had work, they had half of the device.
    let served = served_meanwhile.load(Ordering::SeqCst);
    assert!(
        served >= 4 * CALLERS,
        "{served} requests were answered beside the stream"
    );
    for (id, margin) in requested {
        assert!(
            (margin - streamed[&id]).abs() <= 1e-5,
            "{id}: {margin} {}",
            streamed[&id]
        );
    }
}

#[test]
fn suggestions_are_refused_in_time_during_an_outage_and_taken_after_it() {
    // Together, they are more than the writer holds for the brokers.
    const LONG: usize = 900_000;
    const CALLERS: usize = 32;
    const HELD: usize = 16 << 20;
    let broker = Broker::embedded();
    let Broker::Embedded(embedded) = &broker else {
        unreachable!()
    };
    let names = Names::create(&broker, "suggestions", 1);
    let feedback = format!("{}-feedback", names.comments);
    broker.create_topic(&feedback, 1);
    let folder = tempfile::tempdir().unwrap();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let settings = settings(&broker.address(), &names, "one", "");
    let variables = [
        ("MODERATORD__API__LISTEN", format!("127.0.0.1:{port}")),
        ("MODERATORD__API__LIMITS__TIMEOUT", "1s".to_owned()),
        ("MODERATORD__TOPICS__FEEDBACK", feedback.clone()),
        ("MODERATORD__DELIVERY", broker.delivery().as_str().to_owned()),
    ];
    let mut process = Process::spawn(folder.path(), "one", &settings, &variables);
    let is_taken = |text: &str| suggest(port, text).is_some_and(|(status, _)| status == 200);
    eventually("suggestions are taken", || is_taken("before"));

    broker_down(embedded.cluster(), 1);
    let refuse = |text: &str| {
        let began = Instant::now();
        let (status, body) = suggest(port, text).unwrap();
        assert!([503, 504].contains(&status), "{status} {body}");
        // The limit is one second, and the machine may be busy.
        assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    };
    std::thread::scope(|scope| {
        for caller in 0..CALLERS {
            scope.spawn(move || refuse(&format!("{caller} {}", "a long walk ".repeat(LONG / 12))));
        }
    });
    (0..3).for_each(|number| refuse(&format!("short {number}")));
    // Comments are scored as ever.
    eventually("a comment is scored", || {
        ask(port, 0..1).is_some_and(|(status, _)| status == 200)
    });

    embedded.cluster().broker_up(1).unwrap();
    eventually("suggestions are taken again", || is_taken("after"));
    let texts: Vec<String> = broker
        .read(&feedback)
        .iter()
        .map(|record| record.json()["text"].as_str().unwrap().to_owned())
        .collect();
    for text in ["before", "after"] {
        assert!(texts.iter().any(|found| found == text), "{text}");
    }
    let long = texts.iter().filter(|text| text.len() > LONG / 2).count();
    assert!(long * LONG <= HELD, "{long} suggestions were held during the outage");
    process.signal("TERM");
    assert_eq!(process.wait(), Some(0), "{}", process.log());
}
