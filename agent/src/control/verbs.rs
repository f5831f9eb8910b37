//! The operator's verbs: how each is asked for, whom it is about, and what it is answered with.
//!
//! A verb is a row of the table at the end of this file. The server's routes and the tool's requests are made from it, so no
//! method and no address is written anywhere else. Whoever carries verbs out implements [`CarryOut`] once for each row; a
//! verb that is left out doesn't compile.
//!
//! An address is `/v1`, then a collection and a name for each part of the subject, then the verb's word, as in
//! `/v1/volumes/data/peers/b/pause`. The request's fields are the body, as JSON; a request without fields has no body.

use super::api::*;
use super::server;
use crate::config::Name;
use axum::http::Method;
use axum::routing::MethodRouter;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt::Debug;
use std::sync::Arc;

/// A request of the operator.
pub trait Verb: Serialize + DeserializeOwned + Debug + Send + 'static {
    /// `GET` for what changes nothing, else `POST`.
    const METHOD: Method;
    /// The last part of its address.
    const WORD: &'static str;
    /// Whether it has a body: one without fields has none.
    const HAS_BODY: bool = size_of::<Self>() > 0;
    /// Whom it is about.
    type Subject: Subject;
    /// What it is answered with, unless that is a [`Failure`].
    type Reply: Serialize + DeserializeOwned + Send;

    /// Its address, with a place in braces for each name.
    #[must_use]
    fn pattern() -> String {
        let places = Self::Subject::COLLECTIONS.iter().map(|collection| format!("{{{collection}}}"));
        address::<Self>(places)
    }

    /// Its address, with its query, for one subject.
    fn address(subject: &Self::Subject) -> String {
        let path = address::<Self>(subject.names().into_iter().map(str::to_owned));
        match subject.query() {
            Some(query) => format!("{path}?{query}"),
            None => path,
        }
    }

    /// Its body; empty where it has none.
    ///
    /// # Errors
    /// A field that JSON can't hold, as a path that is not UTF-8.
    fn body(&self) -> serde_json::Result<Vec<u8>> {
        if Self::HAS_BODY { serde_json::to_vec(self) } else { Ok(Vec::new()) }
    }

    /// The request with this body.
    ///
    /// # Errors
    /// A body that is no JSON, or lacks a field, or has one too many.
    fn read(body: &[u8]) -> serde_json::Result<Self> {
        // A structure without fields is null in JSON.
        serde_json::from_slice(if Self::HAS_BODY { body } else { b"null" })
    }
}

fn address<V: Verb>(names: impl Iterator<Item = String>) -> String {
    let steps = V::Subject::COLLECTIONS.iter().zip(names);
    let path: String = steps.map(|(collection, name)| format!("/{collection}/{name}")).collect();
    format!("/v1{path}/{}", V::WORD)
}

/// Whom a verb is about.
pub trait Subject: Sized + Send + 'static {
    /// The collections that lead to it, the outermost first.
    const COLLECTIONS: &'static [&'static str];

    /// What it is called in each of them. Each name consists of characters that stand for themselves in an address.
    fn names(&self) -> Vec<&str>;

    /// What the address's query says of it.
    fn query(&self) -> Option<String> {
        None
    }

    /// The subject that is called so in its collections.
    ///
    /// # Errors
    /// [`FailureKind::Usage`] where something is no name, or the query makes no sense.
    fn read(names: Vec<String>, query: Option<&str>) -> Result<Self, Failure>;
}

/// This host.
impl Subject for () {
    const COLLECTIONS: &'static [&'static str] = &[];

    fn names(&self) -> Vec<&str> {
        Vec::new()
    }

    fn read(_: Vec<String>, _: Option<&str>) -> Result<Self, Failure> {
        Ok(())
    }
}

/// One volume or all of them.
impl Subject for Option<Name> {
    const COLLECTIONS: &'static [&'static str] = &[];

    fn names(&self) -> Vec<&str> {
        Vec::new()
    }

    fn query(&self) -> Option<String> {
        self.as_ref().map(|volume| format!("volume={volume}"))
    }

    fn read(_: Vec<String>, query: Option<&str>) -> Result<Self, Failure> {
        let Some(query) = query else { return Ok(None) };
        match query.strip_prefix("volume=") {
            Some(volume) => name(volume.to_owned()).map(Some),
            None => Err(Failure::new(FailureKind::Usage, "the only thing to ask a status for is a volume")),
        }
    }
}

/// A volume.
impl Subject for Name {
    const COLLECTIONS: &'static [&'static str] = &["volumes"];

    fn names(&self) -> Vec<&str> {
        vec![self.as_str()]
    }

    fn read(names: Vec<String>, _: Option<&str>) -> Result<Self, Failure> {
        let [volume] = exactly(names)?;
        name(volume)
    }
}

/// Another host of a volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PeerOf {
    /// The volume.
    pub volume: Name,
    /// The host.
    pub peer: Name,
}

impl Subject for PeerOf {
    const COLLECTIONS: &'static [&'static str] = &["volumes", "peers"];

    fn names(&self) -> Vec<&str> {
        vec![self.volume.as_str(), self.peer.as_str()]
    }

    fn read(names: Vec<String>, _: Option<&str>) -> Result<Self, Failure> {
        let [volume, peer] = exactly(names)?;
        Ok(Self { volume: name(volume)?, peer: name(peer)? })
    }
}

/// An invitation to a volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct InvitationOf {
    /// The volume.
    pub volume: Name,
    /// What [`InvitationStatus::id`] says.
    pub id: String,
}

impl Subject for InvitationOf {
    const COLLECTIONS: &'static [&'static str] = &["volumes", "invitations"];

    fn names(&self) -> Vec<&str> {
        vec![self.volume.as_str(), &self.id]
    }

    fn read(names: Vec<String>, _: Option<&str>) -> Result<Self, Failure> {
        let [volume, id] = exactly(names)?;
        Ok(Self { volume: name(volume)?, id })
    }
}

fn name(text: String) -> Result<Name, Failure> {
    Name::try_from(text).map_err(|error| Failure::from_error(FailureKind::Usage, &error))
}

fn exactly<const COUNT: usize>(names: Vec<String>) -> Result<[String; COUNT], Failure> {
    let wrong =
        |_| Failure::new(FailureKind::Usage, format!("it takes {COUNT} names to say whom it is about"));
    names.try_into().map_err(wrong)
}

/// Whoever carries a verb out.
pub trait CarryOut<V: Verb>: Send + Sync + 'static {
    /// Carries it out. A call whose future is dropped was given up by the tool: what it had begun is stopped or finished,
    /// never left half done.
    fn carry_out(
        &self,
        subject: V::Subject,
        request: V,
    ) -> impl Future<Output = Result<V::Reply, Failure>> + Send;
}

/// A row of the table, in words.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Row {
    /// The type of the request.
    pub request: &'static str,
    /// [`Verb::METHOD`].
    pub method: Method,
    /// [`Verb::pattern`].
    pub pattern: String,
}

macro_rules! verbs {
    ($($request:ident: $method:ident $word:literal, $subject:ty => $reply:ty;)*) => {
        $(
            impl Verb for $request {
                const METHOD: Method = Method::$method;
                const WORD: &'static str = $word;
                type Subject = $subject;
                type Reply = $reply;
            }
        )*

        /// Whoever carries out all verbs.
        pub trait Operations: $(CarryOut<$request> +)* {}

        impl<O: $(CarryOut<$request> +)*> Operations for O {}

        /// All verbs.
        #[must_use]
        pub fn table() -> Vec<Row> {
            vec![$(Row {
                request: stringify!($request),
                method: $request::METHOD,
                pattern: $request::pattern(),
            }),*]
        }

        /// Where each verb is asked for, and what answers it there.
        pub(super) fn routes<O: Operations>() -> Vec<(String, MethodRouter<Arc<O>>)> {
            vec![$(($request::pattern(), server::route::<$request, O>())),*]
        }
    };
}

// The request, how and with which word it is asked for, whom it is about, what it is answered with.
verbs! {
    StatusRequest:      GET  "status",      Option<Name> => StatusReply;
    CreateRequest:      POST "volumes",     ()           => StatusReply;
    JoinRequest:        POST "join",        ()           => StatusReply;
    InviteRequest:      POST "invite",      Name         => Invitation;
    InvitationsRequest: GET  "invitations", Name         => InvitationsReply;
    RevokeRequest:      POST "revoke",      InvitationOf => InvitationsReply;
    PeersRequest:       GET  "peers",       Name         => PeersReply;
    RemovePeerRequest:  POST "remove",      PeerOf       => PeerRemoval;
    PauseRequest:       POST "pause",       PeerOf       => PeerStatus;
    ResumeRequest:      POST "resume",      PeerOf       => PeerStatus;
    ModeRequest:        POST "mode",        PeerOf       => PeerStatus;
    TuneRequest:        POST "tune",        PeerOf       => PeerStatus;
    AddressRequest:     POST "address",     PeerOf       => PeerStatus;
    CompareRequest:     POST "compare",     PeerOf       => Comparison;
    PromoteRequest:     POST "promote",     Name         => Promotion;
    DemoteRequest:      POST "demote",      Name         => Demotion;
    SwitchRequest:      POST "switch",      Name         => Switch;
    ResolveRequest:     POST "resolve",     Name         => Resolution;
    UndoRequest:        POST "undo",        Name         => Undoing;
    ForgetRequest:      POST "forget",      Name         => Forgetting;
    ReleaseRequest:     POST "release",     Name         => Release;
    RebuildRequest:     POST "rebuild",     Name         => Rebuilding;
}
