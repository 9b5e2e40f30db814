package process

import (
	"bytes"
	"testing"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	rpc "github.com/wrenn/wrenn/api/proto/process"
)

func TestOutputIsWrittenAsProtoJSON(t *testing.T) {
	for _, data := range [][]byte{nil, {}, []byte("x"), {0, 0xff, 0xfe}, bytes.Repeat([]byte("<>\"\\\n"), 10000)} {
		for _, k := range []kind{stdout, stderr, terminal} {
			event := dataEvent(k, data)
			for wanted, got := range map[proto.Message]proto.Message{
				&rpc.StartResponse{Event: event}:   new(rpc.StartResponse),
				&rpc.ConnectResponse{Event: event}: new(rpc.ConnectResponse),
			} {
				text, err := jsonCodec{}.MarshalAppend([]byte("before "), wanted)
				if err != nil {
					t.Fatal(err)
				}
				text, ok := bytes.CutPrefix(text, []byte("before "))
				if !ok {
					t.Fatalf("what was there before is gone: %.50q", text)
				}
				if err := protojson.Unmarshal(text, got); err != nil {
					t.Fatalf("%.100q: %v", text, err)
				}
				if !proto.Equal(got, wanted) {
					t.Errorf("got %.100v, want %.100v", got, wanted)
				}
			}
		}
	}
}

func TestEventsWithoutOutputAreWrittenAsProtoJSON(t *testing.T) {
	for _, wanted := range []*rpc.StartResponse{
		{},
		{Event: &rpc.ProcessEvent{}},
		{Event: endEvent(End{Code: 3, Exited: true, Status: "exit status 3"})},
		{Event: &rpc.ProcessEvent{Event: &rpc.ProcessEvent_Data{Data: &rpc.ProcessEvent_DataEvent{}}}},
	} {
		text, err := jsonCodec{}.Marshal(wanted)
		if err != nil {
			t.Fatal(err)
		}
		got := new(rpc.StartResponse)
		if err := protojson.Unmarshal(text, got); err != nil || !proto.Equal(got, wanted) {
			t.Errorf("got %s, %v, want %v", text, err, wanted)
		}
	}
}

func TestKeystrokesAreReadByHand(t *testing.T) {
	for _, text := range []string{
		`{"process":{"pid":1},"input":{"pty":"YQ=="}}`,
		`{"process":{"pid":4294967295},"input":{"stdin":""}}`,
	} {
		if !readInput([]byte(text), new(rpc.SendInputRequest)) {
			t.Errorf("%s is left to protojson", text)
		}
	}
}

// FuzzReadInput holds what is read by hand against protojson.
func FuzzReadInput(f *testing.F) {
	for _, text := range []string{
		`{"process":{"pid":1},"input":{"pty":"YQ=="}}`,
		`{"process":{"pid":4294967296},"input":{"stdin":"YQ=="}}`,
		`{"process":{"pid":01},"input":{"stdin":"YQ=="}}`,
		`{"process":{"pid":1e3},"input":{"stdin":"YQ=="}}`,
		`{"process":{"pid":-1},"input":{"stdin":"YQ=="}}`,
		`{"process":{"pid":1},"input":{"stdin":"YQ"}}`,
		`{"process":{"pid":1},"input":{"stdin":"YR=="}}`,
		"{\"process\":{\"pid\":1},\"input\":{\"stdin\":\"YQ\n==\"}}",
		`{"process":{"pid":1},"input":{"stdin":"YQ\n=="}}`,
		`{"process":{"pid":1},"input":{"stdin":"_-8="}}`,
		`{"process":{"pid":1},"input":{"stdin":"YQ=="},"input":{"pty":"Yg=="}}`,
		`{"process":{"pid":1},"input":{"stdin":"YQ==","pty":"Yg=="}}`,
		`{"process":{"pid":1},"input":{"other":"YQ=="}}`,
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		got := new(rpc.SendInputRequest)
		if !readInput(data, got) {
			if !proto.Equal(got, new(rpc.SendInputRequest)) {
				t.Errorf("%q was refused, and left %v", data, got)
			}
			return
		}
		wanted := new(rpc.SendInputRequest)
		if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(data, wanted); err != nil {
			t.Fatalf("%q is wrong (%v), and was read as %v", data, err, got)
		}
		if !proto.Equal(got, wanted) {
			t.Errorf("%q: got %v, want %v", data, got, wanted)
		}
	})
}
