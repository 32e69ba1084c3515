package swarm

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"kraken/origin/swarm/rate"
	"kraken/proto/config"
)

func TestUploadRateIsKept(t *testing.T) {
	b := randomBytes(23, 8<<20)
	seed := newNode(t, func(c *Config) { c.UploadRate = 4 << 20 })
	m := seed.seed(b)
	began := time.Now()
	leech := newNode(t, nil)
	leech.fetch(m, nil, seed.peer()).finish()
	// The burst goes at once, the rest takes 1.9 s.
	if took := time.Since(began); took < 1500*time.Millisecond {
		t.Errorf("8 MiB at 4 MiB/s took %s", took)
	}
}

func TestDownloadRateIsKept(t *testing.T) {
	b := randomBytes(24, 4<<20)
	seed := newNode(t, nil)
	m := seed.seed(b)
	began := time.Now()
	leech := newNode(t, func(c *Config) { c.DownloadRate = 4 << 20 })
	leech.fetch(m, nil, seed.peer()).finish()
	if took := time.Since(began); took < 800*time.Millisecond {
		t.Errorf("4 MiB at 4 MiB/s took %s", took)
	}
}

// TestRateOfABlobIsKept; that each blob has a limit of its own is package rate's to show.
func TestRateOfABlobIsKept(t *testing.T) {
	for _, c := range []struct {
		name        string
		seed, leech Rates
	}{
		{"up", Rates{BlobUploadRate: 2 << 20}, Rates{}},
		{"down", Rates{}, Rates{BlobDownloadRate: 2 << 20}},
	} {
		t.Run(c.name, func(t *testing.T) {
			seed := newNode(t, func(k *Config) { k.Rates = c.seed })
			leech := newNode(t, func(k *Config) { k.Rates = c.leech })
			began := time.Now()
			leech.fetch(seed.seed(randomBytes(30, 4<<20)), nil, seed.peer()).finish()
			if took := time.Since(began); took < 1600*time.Millisecond { // 2 s less the burst
				t.Errorf("a blob of 4 MiB at 2 MiB/s took %s", took)
			}
		})
	}
}

// TestRateChangesForWhatIsUnderWay raises a rate in the middle of a download that would take half a minute.
func TestRateChangesForWhatIsUnderWay(t *testing.T) {
	b := randomBytes(25, 8<<20)
	seed := newNode(t, func(c *Config) { c.UploadRate = 256 << 10 })
	leech := newNode(t, nil)
	began := time.Now()
	d := leech.fetch(seed.seed(b), nil, seed.peer())
	eventually(t, "the first piece", func() bool { return d.part.Bitmap().Count() > 0 })
	if err := seed.SetRates(Rates{}); err != nil {
		t.Fatal(err)
	}
	d.finish()
	if took := time.Since(began); took > 15*time.Second {
		t.Errorf("took %s although the limit was lifted", took)
	}
	leech.has(b)
}

func TestDropEndsAWaitForTheRate(t *testing.T) {
	seed := newNode(t, func(c *Config) { c.UploadRate = rate.Min })
	m := seed.seed(randomBytes(26, 4<<20))
	leech := newNode(t, nil)
	d := leech.fetch(m, nil, seed.peer())
	eventually(t, "the first piece", func() bool { return d.part.Bitmap().Count() > 0 })
	began := time.Now()
	seed.Forget(m.Digest)
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("forgetting a blob that waits for its turn took %s", took)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if err := d.part.Close(); err != nil {
		t.Error(err)
	}
}

func TestOperatorsChangeRates(t *testing.T) {
	n := newNode(t, func(c *Config) { c.BlobUploadRate = 5 << 20 })
	m := http.NewServeMux()
	n.ControlRoutes(m)
	for _, c := range []struct {
		body string
		code int
		want Rates
	}{
		{`{"upload_rate": "25Mbit/s"}`, 200, Rates{UploadRate: 3_125_000, BlobUploadRate: 5 << 20}},
		{`{"download_rate": "10MiB/s", "blob_upload_rate": "0"}`, 200, Rates{UploadRate: 3_125_000, DownloadRate: 10 << 20}},
		{`{"upload": "1"}`, 400, Rates{UploadRate: 3_125_000, DownloadRate: 10 << 20}},
		{`{"upload_rate": "1kbit/s"}`, 400, Rates{UploadRate: 3_125_000, DownloadRate: 10 << 20}},
		{`{"upload_rate": "fast"}`, 400, Rates{UploadRate: 3_125_000, DownloadRate: 10 << 20}},
		{``, 400, Rates{UploadRate: 3_125_000, DownloadRate: 10 << 20}},
		{`{"upload_rate": "0"} {"download_rate": "0"}`, 400, Rates{UploadRate: 3_125_000, DownloadRate: 10 << 20}},
		{`{"upload_rate": 5000000}`, 400, Rates{UploadRate: 3_125_000, DownloadRate: 10 << 20}},
	} {
		w := httptest.NewRecorder()
		m.ServeHTTP(w, httptest.NewRequest("PUT", "/limits", strings.NewReader(c.body)))
		if w.Code != c.code || n.Rates() != c.want {
			t.Errorf("%s: %d %s, rates %+v, want %+v", c.body, w.Code, w.Body, n.Rates(), c.want)
		}
	}
	for body, want := range map[string]string{
		`{"upload_rate": 5000000}`: `upload_rate is a number, want a text like "25Mbit/s"`,
		`{} {}`:                    "want one JSON object",
	} {
		w := httptest.NewRecorder()
		m.ServeHTTP(w, httptest.NewRequest("PUT", "/limits", strings.NewReader(body)))
		var answer struct {
			Errors []struct{ Code, Message string }
		}
		if err := json.Unmarshal(w.Body.Bytes(), &answer); err != nil || len(answer.Errors) != 1 || answer.Errors[0].Code != "LIMITS_INVALID" {
			t.Fatalf("%s: %s, %v", body, w.Body, err)
		}
		if got := answer.Errors[0].Message; !strings.Contains(got, want) || !strings.Contains(got, "upload_rate") {
			t.Errorf("%s: %q, want it to say %q", body, got, want)
		}
	}
	// What GET answers can be PUT back.
	w := httptest.NewRecorder()
	m.ServeHTTP(w, httptest.NewRequest("GET", "/limits", nil))
	if err := n.SetRates(Rates{}); err != nil {
		t.Fatal(err)
	}
	m.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("PUT", "/limits", w.Body))
	if want := (Rates{UploadRate: 3_125_000, DownloadRate: 10 << 20}); n.Rates() != want {
		t.Errorf("%+v came back, want %+v", n.Rates(), want)
	}
	if err := n.SetRates(Rates{DownloadRate: config.Rate(-1)}); err == nil {
		t.Error("a negative rate was taken")
	}
}
